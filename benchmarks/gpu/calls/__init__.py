"""Calls of every op, with poison in every unused place, and the rules for their results."""

from __future__ import annotations

from .base import Call, Case, TestedOp
from .decode_attention import DecodeAttention
from .flash_attention import FlashAttention, FlashAttentionVarlen
from .kv_cache_update import KvCacheUpdate
from .selective_v_attention import SelectiveVAttention
from .swiglu import Swiglu

# In the order of their importance.
TESTED_OPS: dict[str, TestedOp] = {
    tested.op: tested
    for tested in (
        DecodeAttention(),
        FlashAttention(backward=False),
        FlashAttention(backward=True),
        KvCacheUpdate(),
        SelectiveVAttention(),
        FlashAttentionVarlen(backward=False),
        FlashAttentionVarlen(backward=True),
        Swiglu(backward=False),
        Swiglu(backward=True),
    )
}

__all__ = ["TESTED_OPS", "Call", "Case", "TestedOp"]
