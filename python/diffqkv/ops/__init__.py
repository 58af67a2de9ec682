"""The ops: functions that check and dispatch, the compiled library, and plain torch beside it.

Notation of the shapes: `b` batch, `s` tokens, `n_q, n_k, n_v` heads, `d_k, d_v` head dimensions, G = gcd(n_k, n_v)
KV groups. q head i reads K head `i * n_k // n_q` and V head `i * n_v // n_q` (SIGMA, arXiv 2501.13629, eq. 16 and 17),
so n_k and n_v divide n_q. Head dimensions are multiples of 8 from 8 to 256. Tensors are float32, bfloat16 or float16,
all of one call alike, with a last dimension of stride 1 and otherwise any strides; results are contiguous. The
attention that trains, `flash_attention` and `flash_attention_varlen`, also takes float64, in which it then computes.

Every wrong argument is a ValueError that is a RuntimeError too, as callers of torch expect it, or a TypeError if its
type or dtype is wrong, with the text `argument: got ..., want ...`, raised before anything is written. Numbers may be
numpy's, or tensors without dimensions, whose value is read; a bool is none.

A function and its file have one name, and `ops.x` is the function: import from the file by `from .x import ...`, or
take the parts of an op from `dispatch.OPS["x"]`.
"""

from . import dispatch, library, rules
from .decode_attention import decode_attention
from .flash_attention import flash_attention
from .flash_attention_varlen import flash_attention_varlen
from .kv_cache_update import kv_cache_update
from .packed_linear import packed_linear
from .rms_norm import rms_norm
from .rotary_embedding import rotary_embedding
from .selective_v_attention import selective_v_attention
from .swiglu import swiglu

__all__ = [
    "decode_attention",
    "flash_attention",
    "flash_attention_varlen",
    "kv_cache_update",
    "packed_linear",
    "rms_norm",
    "rotary_embedding",
    "selective_v_attention",
    "swiglu",
]

if library.loaded:
    for _op in dispatch.OPS.values():
        rules.register(_op)
