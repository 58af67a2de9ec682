"""The SIGMA models. Importing this package makes the Auto classes know them under "sigma_diffqkv"."""

from transformers import AutoConfig

from .configuration_sigma import PRESETS, SigmaConfig
from .modeling_sigma import (
    AUTO_CLASSES,
    SigmaForCausalLM,
    SigmaForQuestionAnswering,
    SigmaForSequenceClassification,
    SigmaForTokenClassification,
    SigmaModel,
    SigmaPreTrainedModel,
)

AutoConfig.register(SigmaConfig.model_type, SigmaConfig, exist_ok=True)

# save_pretrained then puts the model files beside the weights, for readers without this package.
SigmaConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    _auto_class.register(SigmaConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "PRESETS",
    "SigmaConfig",
    "SigmaForCausalLM",
    "SigmaForQuestionAnswering",
    "SigmaForSequenceClassification",
    "SigmaForTokenClassification",
    "SigmaModel",
    "SigmaPreTrainedModel",
]
