"""One random call of each op: its arguments, what it must return, and the same call in other circumstances."""

from __future__ import annotations

from collections.abc import Callable

from .. import bad
from ..draw import Draw
from .decode_attention import decode_attention
from .flash_attention import flash_attention, flash_attention_varlen
from .kv_cache_update import kv_cache_update
from .packed_linear import packed_linear
from .rms_norm import rms_norm
from .rotary_embedding import rotary_embedding
from .selective_v_attention import selective_v_attention
from .swiglu import swiglu

OPS: dict[str, Callable[[Draw], None]] = {
    "flash_attention": flash_attention,
    "flash_attention_varlen": flash_attention_varlen,
    "decode_attention": decode_attention,
    "kv_cache_update": kv_cache_update,
    "packed_linear": packed_linear,
    "selective_v_attention": selective_v_attention,
    "swiglu": swiglu,
    "rms_norm": rms_norm,
    "rotary_embedding": rotary_embedding,
}
BAD_SHARE = 0.15


def run(op: str, seed: int) -> None:
    """The call that seed makes; raises what is wrong with it."""
    d = Draw(op, seed)
    try:
        (bad.CALLS if d.chance(BAD_SHARE) else OPS)[op](d)
    except Exception as error:
        error.add_note("the call: " + ", ".join(d.notes))
        raise
