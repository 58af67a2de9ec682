"""Call overhead: decode with next to nothing to compute."""

import torch

from ...common.accuracy import difference
from ...common.line import Contenders
from ...common.peers import sdpa
from ...common.targets import SDPA_TWIN
from ..layer import Decode, Size, cache_layer

TITLE = "`decode_attention` of one token and so few, always the same, that the call is what takes time"
SIZES = (Size(128),)


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    it = Decode(size, dtype)
    layer = cache_layer(it.k, it.v)
    return Contenders(
        error=difference(it.ours(layer), it.want()),
        ours=[lambda: it.ours(layer)],
        peers={SDPA_TWIN: [lambda: sdpa(it.q, it.k_twin, it.v)]},
    )
