"""Hugging Face models, and the attention function "diffqkv", which other models can use too."""

from . import attention
from .attention import record_selective_v
from .sigma import (
    PRESETS,
    SigmaConfig,
    SigmaForCausalLM,
    SigmaForQuestionAnswering,
    SigmaForSequenceClassification,
    SigmaForTokenClassification,
    SigmaModel,
    SigmaPreTrainedModel,
)

__all__ = [
    "PRESETS",
    "SigmaConfig",
    "SigmaForCausalLM",
    "SigmaForQuestionAnswering",
    "SigmaForSequenceClassification",
    "SigmaForTokenClassification",
    "SigmaModel",
    "SigmaPreTrainedModel",
    "attention",
    "record_selective_v",
]
