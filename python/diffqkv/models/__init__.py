"""Hugging Face models, and the attention function "diffqkv" for models of others."""

from . import attention
from .sigma import (
    PRESETS,
    SigmaConfig,
    SigmaForCausalLM,
    SigmaForSequenceClassification,
    SigmaModel,
    SigmaPreTrainedModel,
)

__all__ = [
    "PRESETS",
    "SigmaConfig",
    "SigmaForCausalLM",
    "SigmaForSequenceClassification",
    "SigmaModel",
    "SigmaPreTrainedModel",
    "attention",
]
