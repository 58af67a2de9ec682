"""swiglu: the gate of a feed-forward layer."""

import torch
import torch.nn.functional as F

import diffqkv

from ...common.accuracy import difference
from ...common.line import Contenders
from ...common.timing import pool
from .. import limits
from ..layer import CLOCK, Size, on_each

COLUMNS = 6144  # the intermediate size of Sigma-1.5B
TITLE = "`swiglu` of so many tokens; torch: silu, then a product; limit: copying as many bytes"
SIZES = (Size(1), Size(1024))


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    gate, up = torch.randn(2, size.tokens, COLUMNS).to(dtype)
    nbytes = 3 * gate.nbytes  # two are read, one is written
    pairs = pool(CLOCK, nbytes, lambda: (gate.clone(), up.clone()))
    want = diffqkv.reference.swiglu(gate.double(), up.double(), torch.float64)
    return Contenders(
        error=difference(diffqkv.swiglu(gate, up), want),
        ours=on_each(pairs, lambda pair: diffqkv.swiglu(*pair)),
        peers={"torch": on_each(pairs, lambda pair: F.silu(pair[0]) * pair[1])},
        limit=limits.copy(nbytes // 2),
        work=nbytes,
    )
