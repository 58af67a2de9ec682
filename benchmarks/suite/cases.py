"""The cases: modules with a TITLE, the SIZES measured by default, and `run(size, dtype, seconds) -> Line`."""

from importlib import import_module
from types import ModuleType

CASES = (
    "prefill", "decode", "cache_update", "selective_v", "training", "call_overhead", "model_decode", "model_training",
)  # fmt: skip


def case(name: str) -> ModuleType:
    """Imported when it is asked for: not all dependencies of a case are those of the package."""
    return import_module(f".{name}", __package__)
