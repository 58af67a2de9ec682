"""flash_attention_backward, as training reaches it: causal attention and its gradients, through autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

import diffqkv

from ...common.accuracy import difference, worst
from ...common.inputs import N_K, N_Q, N_V, D
from ...common.line import TRAINING_TOLERANCE, Contenders
from ...common.peers import sdpa
from ...common.targets import OWN_MHA, SDPA_REPEATED
from .. import limits
from ..layer import Size, heads

TITLE = (
    "`flash_attention`, causal, and its gradients; own MHA: the same kernels, 32 K and V heads; limit: multiply-adds "
    "on registers, for the 7 products of a tile that the gradients are defined by"
)
TRAINS = True
SIZES = (Size(512), Size(1024), Size(2048), Size(4096))
_FLOPS_PER_PAIR = 2 * (2 * D + 5 * D)  # a pair is a query and a key: q k, p v; then p, dp, dq, dk, dv


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return diffqkv.flash_attention(q, k, v, causal=True)


def _step(attention: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)


def _error(gradients: tuple[Tensor, ...], leaves: list[Tensor], dout: Tensor) -> float:
    """The error of all gradients, one KV group after the other: the reference keeps all scores."""
    errors = []
    for group in range(N_K):
        of_group = [x.detach().chunk(N_K, 1)[group].double().requires_grad_() for x in leaves]
        out = diffqkv.reference.attention(*of_group, causal=True)
        want = torch.autograd.grad(out, of_group, dout.chunk(N_K, 1)[group].double())
        errors.append(difference([x.chunk(N_K, 1)[group] for x in gradients], want))
    return worst(errors)


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    def leaf(count: int) -> Tensor:
        return heads(count, size.tokens, dtype).requires_grad_()

    leaves, mha = [leaf(n) for n in (N_Q, N_K, N_V)], [leaf(N_Q) for _ in range(3)]
    dout = heads(N_Q, size.tokens, dtype)
    ours = _step(_ours, leaves, dout)
    flops = N_Q * _FLOPS_PER_PAIR * size.tokens * (size.tokens + 1) / 2
    return Contenders(
        error=_error(ours(), leaves, dout),
        tolerance=TRAINING_TOLERANCE[dtype],
        ours=[ours],
        peers={
            SDPA_REPEATED: [_step(lambda *x: sdpa(*x, causal=True), leaves, dout)],
            OWN_MHA: [_step(_ours, mha, dout)],
        },
        limit=limits.arithmetic(flops, dtype),
        work=flops,
    )
