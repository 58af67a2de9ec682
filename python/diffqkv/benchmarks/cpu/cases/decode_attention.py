"""decode_attention: the newest token of each sequence against all that is cached."""

import torch

from ...common.accuracy import difference
from ...common.line import Contenders
from ...common.peers import matmul_decode, sdpa
from ...common.targets import MATMUL, OWN_TWIN, SDPA_REPEATED, SDPA_TWIN
from .. import limits
from ..layer import Decode, Size, cache_layers, on_each, rows

TITLE = "`decode_attention` on a `diffqkv.Cache`, K in panels; limit: reading as many bytes"
SIZES = (Size(2048), Size(8192), Size(32768), Size(2048, batch=8))


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    it = Decode(size, dtype)
    layers = cache_layers(it.k, it.v)
    nbytes = it.k.nbytes + it.v.nbytes
    return Contenders(
        error=difference(it.ours(layers[0]), it.want()),
        ours=on_each(layers, it.ours),
        peers={
            SDPA_REPEATED: on_each(rows(it.k, it.v), lambda kv: sdpa(it.q, *kv)),
            SDPA_TWIN: on_each(rows(it.k_twin, it.v), lambda kv: sdpa(it.q, *kv)),
            MATMUL: on_each(rows(it.k, it.v), lambda kv: matmul_decode(it.q, *kv)),
            OWN_TWIN: on_each(cache_layers(it.k_twin, it.v), it.ours),
        },
        limit=limits.read(nbytes),
        work=nbytes,
    )
