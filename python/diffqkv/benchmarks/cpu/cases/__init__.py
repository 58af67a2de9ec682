"""The cases of `python -m diffqkv bench`, called as their op or what they measure.

Each is a module with a TITLE, the SIZES measured by default, and `contenders(size, dtype)`; those that TRAIN record
gradients.
"""

from importlib import import_module
from types import ModuleType

import torch

from ...common.line import measure
from ..layer import CLOCK, Size
from ..targets import TARGETS

CASES = (
    "flash_attention", "decode_attention", "kv_cache_update", "selective_v_attention", "flash_attention_backward",
    "swiglu", "packed_linear", "call_overhead", "model_decode", "model_prefill", "model_training",
)  # fmt: skip


def case(name: str) -> ModuleType:
    """The case's module, imported when it is asked for: some need more than the package does."""
    return import_module(f".{name}", __package__)


def run(name: str, size: Size, dtype: torch.dtype, seconds: float) -> dict:
    """Measures a line for about `seconds`; see `common.line.measure` for its record."""
    trains = getattr(case(name), "TRAINS", False)
    torch.manual_seed(0)
    with torch.enable_grad() if trains else torch.inference_mode():
        return measure(name, size, dtype, seconds, case(name).contenders(size, dtype), CLOCK, TARGETS)
