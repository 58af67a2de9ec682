"""Selective V: decode that reads the V rows of the best scores alone."""

from math import gcd

import torch

import diffqkv
from diffqkv import reference

from . import limits
from .layer import N_K, N_Q, N_V, D, Size, decode_layer, heads, matmul_top_k, rotating_layers, rotating_rows
from .line import Line, difference, measure
from .targets import OWN_DENSE

TOP_K = 100
TITLE = (
    f"`selective_v_attention`, top_k = {TOP_K}, on a `diffqkv.Cache`, K in panels; own dense: `decode_attention` on as "
    "many tokens; limit: reading as many bytes as K and the selected V rows have"
)
SIZES = (Size(8192), Size(32768))


def run(size: Size, dtype: torch.dtype, seconds: float) -> Line:
    q = heads(N_Q, 1, dtype, size.batch)
    k, v = heads(N_K, size.tokens, dtype, size.batch), heads(N_V, size.tokens, dtype, size.batch)
    lengths = torch.full((size.batch,), size.tokens, dtype=torch.int32)
    layers, dense_layers, rows = rotating_layers(k, v), rotating_layers(k, v), rotating_rows(k, v)

    def ours():
        layer = next(layers)
        return diffqkv.selective_v_attention(q, layer.k_cache, layer.v_cache, lengths, TOP_K, k_layout=layer.k_layout)

    grouped = (reference.group(x.double(), gcd(N_K, N_V)) for x in (k, v))
    want, _ = reference.selective_v_attention(q.double(), *grouped, lengths, TOP_K)
    nbytes = k.nbytes + size.batch * N_Q * min(TOP_K, size.tokens) * D * dtype.itemsize
    return measure(
        "selective_v",
        size,
        dtype,
        seconds,
        error=difference(ours(), want),
        ours=ours,
        peers={
            OWN_DENSE: lambda: decode_layer(q, next(dense_layers), lengths),
            "torch topk and gather": lambda: matmul_top_k(q, *next(rows), TOP_K),
        },
        limit=limits.read(nbytes),
        work=nbytes,
    )
