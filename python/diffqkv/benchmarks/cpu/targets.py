"""What each line should reach on two threads of a CPU.

Limits are measured in the same run, so that most targets hold for any CPU. Between two lengths that have targets of
their own, the weaker one counts.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.targets import (
    LLAMA,
    LLAMA_CPP,
    OF_LIMIT,
    OVER_TWIN,
    OWN_DENSE,
    OWN_MHA,
    SDPA_REPEATED,
    SDPA_TWIN,
    UNPACKED,
    Target,
)  # fmt: skip

# Some machines' memory has two speeds. Where it is fast, arithmetic no longer hides behind it.
FAST_READ = 50e9  # B/s


def _dot(record: dict) -> bool:
    return record["limit"]["name"] == "bf16 dot"


def _no_dot(record: dict) -> bool:
    return not _dot(record)


def _fast(record: dict) -> bool:
    return record["limit"]["per_second"] >= FAST_READ


def _slow(record: dict) -> bool:
    return not _fast(record)


def _one(form: str) -> Callable[[dict], bool]:
    """Lines of one sequence through a model whose weights have this form."""
    return lambda record: record["weights"] == form and record["batch"] == 1


_packed, _int8, _int4 = _one("packed"), _one("int8"), _one("int4")


def _integers(record: dict) -> bool:
    return _int8(record) or _int4(record)


_NONE, _1K, _4K, _16K = range(512), range(512, 4096), range(4096, 16384), range(16384, 1 << 40)
_SHORT, _MIDDLE, _LONG = range(512, 1024), range(512, 2048), range(2048, 1 << 40)

TARGETS = (
    Target("flash_attention", OF_LIMIT, "≥", 0.65, None, _MIDDLE),
    Target("flash_attention", OF_LIMIT, "≥", 0.80, None, _LONG),
    Target("flash_attention", OF_LIMIT, "≥", None, 0.72, _LONG, _dot),
    Target("flash_attention", OF_LIMIT, "≥", None, 0.75, _LONG, _no_dot),
    Target("flash_attention", SDPA_REPEATED, "≥", 2.2, 2.0, _SHORT),
    Target("flash_attention", SDPA_REPEATED, "≥", 1.3, 1.25, range(1024, 1 << 40)),
    Target("decode_attention", OF_LIMIT, "≥", 0.90, 0.90, where=_slow),
    Target("decode_attention", OF_LIMIT, "≥", 0.75, 0.75, where=_fast),
    Target("decode_attention", OVER_TWIN, "≤", 0.70, 0.70, where=_slow),
    Target("decode_attention", OVER_TWIN, "≤", 0.85, 0.85, where=_fast),
    Target("decode_attention", SDPA_REPEATED, "≥", 4, 15),
    Target("decode_attention", SDPA_TWIN, "≥", 2, 10),
    Target("selective_v_attention", OWN_DENSE, "≥", 2, 1.4, range(8192, 1 << 40)),
    Target("flash_attention_backward", OF_LIMIT, "≥", 0.60, None, range(1024, 1 << 40)),
    Target("flash_attention_backward", SDPA_REPEATED, "≥", 1.3, 6, range(1024, 2048)),
    Target("flash_attention_backward", SDPA_REPEATED, "≥", 1.15, 6, _LONG),
    Target("flash_attention_backward", OWN_MHA, "≥", 1, 1, range(1024, 1 << 40)),
    Target("packed_linear", OF_LIMIT, "≥", 0.85, 0.85, range(17)),
    Target("model_decode", OF_LIMIT, "≥", 0.92, 0.92, _NONE, _packed),
    Target("model_decode", OF_LIMIT, "≥", 0.88, 0.88, range(512, 1 << 40), _packed),
    Target("model_decode", OF_LIMIT, "≥", 0.75, 0.75, where=_integers),
    Target("model_decode", LLAMA_CPP, "≥", None, 1.0, _NONE, _packed),
    Target("model_decode", LLAMA_CPP, "≥", None, 1.05, _1K, _packed),
    Target("model_decode", LLAMA_CPP, "≥", None, 1.25, _4K, _packed),
    Target("model_decode", LLAMA_CPP, "≥", None, 2, _16K, _packed),
    Target("model_decode", LLAMA_CPP, "≥", None, 0.9, _NONE, _integers),
    Target("model_decode", LLAMA_CPP, "≥", None, 1.5, _4K, _integers),
    Target("model_decode", LLAMA_CPP, "≥", None, 2.5, _16K, _integers),
    Target("model_decode", LLAMA, "≥", None, 2, _NONE, _packed),
    Target("model_decode", LLAMA, "≥", None, 3, _4K, _packed),
    Target("model_decode", OVER_TWIN, "≤", 0.8, 0.8, _16K, _int4),
    Target("model_prefill", LLAMA_CPP, "≥", None, 1.3, where=_packed),
    Target("model_prefill", UNPACKED, "≥", None, 1.6, where=_packed),
    Target("call_overhead", SDPA_TWIN, "≥", 0.5, 0.5),
)
