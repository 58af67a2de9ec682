"""Call overhead: decode with next to nothing to compute."""

import torch

import diffqkv

from .layer import N_K, N_Q, N_V, Size, cache_layer, decode_layer, heads, sdpa
from .line import Line, difference, measure
from .targets import SDPA_TWIN

TITLE = "`decode_attention` of one token and so few, always the same, that the call is what takes time"
SIZES = (Size(128),)


def run(size: Size, dtype: torch.dtype, seconds: float) -> Line:
    q = heads(N_Q, 1, dtype, size.batch)
    k, v, k_twin = (heads(count, size.tokens, dtype, size.batch) for count in (N_K, N_V, N_V))
    lengths = torch.full((size.batch,), size.tokens, dtype=torch.int32)
    layer = cache_layer(k, v)

    def ours():
        return decode_layer(q, layer, lengths)

    return measure(
        "call_overhead",
        size,
        dtype,
        seconds,
        error=difference(ours(), diffqkv.reference.attention(q.double(), k.double(), v.double())),
        ours=ours,
        peers={SDPA_TWIN: lambda: sdpa(q, k_twin, v)},
    )
