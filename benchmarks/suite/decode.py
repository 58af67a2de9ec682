"""Decode: the newest token of each sequence against all that is cached."""

import torch

import diffqkv

from . import limits
from .layer import N_K, N_Q, N_V, Size, decode_layer, heads, matmul_decode, rotating_layers, rotating_rows, sdpa
from .line import Line, difference, measure
from .targets import MATMUL, SDPA_REPEATED, SDPA_TWIN

TITLE = "`decode_attention` on a `diffqkv.Cache`, K in panels; limit: reading as many bytes"
SIZES = (Size(2048), Size(8192), Size(32768), Size(2048, batch=8))


def run(size: Size, dtype: torch.dtype, seconds: float) -> Line:
    q = heads(N_Q, 1, dtype, size.batch)
    k, v, k_twin = (heads(count, size.tokens, dtype, size.batch) for count in (N_K, N_V, N_V))
    lengths = torch.full((size.batch,), size.tokens, dtype=torch.int32)
    layers, twins = rotating_layers(k, v), rotating_layers(k_twin, v)
    rows, matmul_rows, twin_rows = rotating_rows(k, v), rotating_rows(k, v), rotating_rows(k_twin, v)

    def ours():
        return decode_layer(q, next(layers), lengths)

    nbytes = k.nbytes + v.nbytes
    return measure(
        "decode",
        size,
        dtype,
        seconds,
        error=difference(ours(), diffqkv.reference.attention(q.double(), k.double(), v.double())),
        ours=ours,
        peers={
            SDPA_REPEATED: lambda: sdpa(q, *next(rows)),
            SDPA_TWIN: lambda: sdpa(q, *next(twin_rows)),
            MATMUL: lambda: matmul_decode(q, *next(matmul_rows)),
        },
        twin=lambda: decode_layer(q, next(twins), lengths),
        limit=limits.read(nbytes),
        work=nbytes,
    )
