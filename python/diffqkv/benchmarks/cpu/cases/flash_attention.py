"""flash_attention: causal attention of a whole prompt."""

import torch
from torch import Tensor

import diffqkv

from ...common.accuracy import difference, worst
from ...common.inputs import N_K, N_Q, N_V, D
from ...common.line import Contenders
from ...common.peers import sdpa
from ...common.targets import OWN_TWIN, SDPA_REPEATED, SDPA_TWIN
from .. import limits
from ..layer import Size, heads

TITLE = "`flash_attention`, causal; limit: multiply-adds on registers"
SIZES = (Size(512), Size(1024), Size(2048), Size(4096))
_CHECKED_TOGETHER = 256  # queries: the reference keeps all their scores


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    q, k, v = q.double(), k.double(), v.double()
    errors = []
    for begin in range(0, q.shape[2], _CHECKED_TOGETHER):
        end = min(begin + _CHECKED_TOGETHER, q.shape[2])
        want = diffqkv.reference.attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], causal=True)
        errors.append(difference(out[:, :, begin:end], want))
    return worst(errors)


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    q, k, v, k_twin = (heads(n, size.tokens, dtype) for n in (N_Q, N_K, N_V, N_V))
    flops = 2 * N_Q * (2 * D) * size.tokens * (size.tokens + 1) / 2
    return Contenders(
        error=_error(diffqkv.flash_attention(q, k, v, causal=True), q, k, v),
        ours=[lambda: diffqkv.flash_attention(q, k, v, causal=True)],
        peers={
            SDPA_REPEATED: [lambda: sdpa(q, k, v, causal=True)],
            SDPA_TWIN: [lambda: sdpa(q, k_twin, v, causal=True)],
            OWN_TWIN: [lambda: diffqkv.flash_attention(q, k_twin, v, causal=True)],
        },
        limit=limits.arithmetic(flops, dtype),
        work=flops,
    )
