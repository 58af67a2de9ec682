"""The ops: functions that check and dispatch, the compiled library, and plain torch beside it."""

from . import library
from .functions import (
    decode_attention,
    flash_attention,
    flash_attention_varlen,
    kv_cache_update,
    selective_v_attention,
    swiglu,
)

if library.loaded:
    from .rules import autograd, fake, flops, vmap  # noqa: F401 (they register themselves)

__all__ = [
    "decode_attention",
    "flash_attention",
    "flash_attention_varlen",
    "kv_cache_update",
    "selective_v_attention",
    "swiglu",
]
