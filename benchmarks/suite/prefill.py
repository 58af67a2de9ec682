"""Prefill: causal attention of a whole prompt."""

import torch

import diffqkv

from . import limits
from .layer import N_K, N_Q, N_V, D, Size, heads, sdpa
from .line import Line, difference, measure
from .targets import SDPA_REPEATED, SDPA_TWIN

TITLE = "`flash_attention`, causal; limit: multiply-adds on registers"
SIZES = (Size(512), Size(1024), Size(2048), Size(4096))
_CHECKED_TOGETHER = 256  # queries: the reference keeps all their scores


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    q, k, v = q.double(), k.double(), v.double()
    errors = []
    for begin in range(0, q.shape[2], _CHECKED_TOGETHER):
        end = min(begin + _CHECKED_TOGETHER, q.shape[2])
        want = diffqkv.reference.attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], causal=True)
        errors.append(difference(out[:, :, begin:end], want))
    return torch.tensor(errors).max().item()  # unlike max(), it keeps a NaN


def run(size: Size, dtype: torch.dtype, seconds: float) -> Line:
    tokens = size.tokens
    q, k, v = (heads(count, tokens, dtype) for count in (N_Q, N_K, N_V))
    k_twin = heads(N_V, tokens, dtype)

    def ours():
        return diffqkv.flash_attention(q, k, v, causal=True)

    flops = 2 * N_Q * (2 * D) * tokens * (tokens + 1) / 2
    return measure(
        "prefill",
        size,
        dtype,
        seconds,
        error=_error(ours(), q, k, v),
        ours=ours,
        peers={SDPA_REPEATED: lambda: sdpa(q, k, v, True), SDPA_TWIN: lambda: sdpa(q, k_twin, v, True)},
        twin=lambda: diffqkv.flash_attention(q, k_twin, v, causal=True),
        limit=limits.arithmetic(flops, dtype),
        work=flops,
    )
