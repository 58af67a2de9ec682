"""selective_v_attention: decode that reads the V rows of the best scores alone."""

import torch
from torch import Tensor

import diffqkv
from diffqkv import reference

from ...common.accuracy import difference
from ...common.inputs import N_Q, D, as_caches
from ...common.line import Contenders
from ...common.peers import matmul_top_k
from ...common.targets import OWN_DENSE
from .. import limits
from ..layer import Decode, Size, cache_layers, on_each, rows

TOP_K = 100
TITLE = (
    f"`selective_v_attention`, top_k = {TOP_K}, on a `diffqkv.Cache`, K in panels; own dense: `decode_attention` on as "
    "many tokens; limit: reading as many bytes as K and the selected V rows have"
)
SIZES = (Size(8192), Size(32768))


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    it = Decode(size, dtype)
    layers = cache_layers(it.k, it.v)

    def ours(layer: diffqkv.cache.CacheLayer) -> Tensor:
        caches = layer.k_cache, layer.v_cache
        return diffqkv.selective_v_attention(it.q, *caches, it.lengths, TOP_K, k_layout=layer.k_layout)

    caches = as_caches(it.k.double(), it.v.double())
    want, _ = reference.selective_v_attention(it.q.double(), *caches, it.lengths, TOP_K)
    nbytes = it.k.nbytes + size.batch * N_Q * min(TOP_K, size.tokens) * D * dtype.itemsize
    return Contenders(
        error=difference(ours(layers[0]), want),
        ours=on_each(layers, ours),
        peers={
            OWN_DENSE: on_each(cache_layers(it.k, it.v), it.ours),
            "torch topk and gather": on_each(rows(it.k, it.v), lambda kv: matmul_top_k(it.q, *kv, TOP_K)),
        },
        limit=limits.read(nbytes),
        work=nbytes,
    )
