"""The cases: modules with a TITLE, the SIZES measured by default, and `run(size, dtype, seconds) -> Line`."""

from types import ModuleType

from . import cache_update, call_overhead, decode, prefill, selective_v

CASES: dict[str, ModuleType] = {
    "prefill": prefill,
    "decode": decode,
    "cache_update": cache_update,
    "selective_v": selective_v,
    "call_overhead": call_overhead,
}
