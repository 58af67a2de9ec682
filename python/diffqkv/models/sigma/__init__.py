"""The SIGMA models. Importing this package makes the Auto classes know them under "sigma_diffqkv"."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_sigma import PRESETS, SigmaConfig
from .modeling_sigma import SigmaForCausalLM, SigmaForSequenceClassification, SigmaModel, SigmaPreTrainedModel

AutoConfig.register(SigmaConfig.model_type, SigmaConfig, exist_ok=True)
AutoModel.register(SigmaConfig, SigmaModel, exist_ok=True)
AutoModelForCausalLM.register(SigmaConfig, SigmaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SigmaConfig, SigmaForSequenceClassification, exist_ok=True)

# save_pretrained then puts the two model files beside the weights, for readers without this package.
SigmaConfig.register_for_auto_class()
SigmaModel.register_for_auto_class("AutoModel")
SigmaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SigmaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "PRESETS",
    "SigmaConfig",
    "SigmaForCausalLM",
    "SigmaForSequenceClassification",
    "SigmaModel",
    "SigmaPreTrainedModel",
]
