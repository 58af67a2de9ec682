"""The cases of `python -m diffqkv bench`, called as their op or what they measure.

Each is a module with a TITLE, the SIZES measured by default, and `run(size, dtype, seconds)`, which returns the record
of a line (`common.line.measure`).
"""

from importlib import import_module
from types import ModuleType

CASES = (
    "flash_attention", "decode_attention", "kv_cache_update", "selective_v_attention", "flash_attention_backward",
    "swiglu", "call_overhead", "model_decode", "model_training",
)  # fmt: skip


def case(name: str) -> ModuleType:
    """The case's module, imported when it is asked for: some need more than the package does."""
    return import_module(f".{name}", __package__)
