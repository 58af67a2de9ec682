"""Call overhead: decode with next to nothing to compute."""

import torch

from ..common.accuracy import difference
from ..common.peers import sdpa
from ..common.targets import SDPA_TWIN
from .layer import Decode, Size, cache_layer, measure

TITLE = "`decode_attention` of one token and so few, always the same, that the call is what takes time"
SIZES = (Size(128),)


def run(size: Size, dtype: torch.dtype, seconds: float) -> dict:
    it = Decode(size, dtype)
    layer = cache_layer(it.k, it.v)
    return measure(
        "call_overhead",
        size,
        dtype,
        seconds,
        error=difference(it.ours(layer), it.want()),
        ours=[lambda: it.ours(layer)],
        peers={SDPA_TWIN: [lambda: sdpa(it.q, it.k_twin, it.v)]},
    )
