"""What the lines of attention of whole prompts share, forward and backward: sizes, inputs, peers, targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend

from diffqkv.benchmarks.common import peers
from diffqkv.benchmarks.common.inputs import N_Q, N_V
from diffqkv.benchmarks.common.peers import repeated
from diffqkv.benchmarks.common.targets import RATE, Target

from ..context import Context
from .base import K, cached, random, target

_DIMS = [(64, 64), (128, 128), (64, 128)]
PROMPTS = [(dims, 16 * K // tokens, tokens) for tokens in (8 * K, 16 * K, 4 * K, 2 * K, K) for dims in _DIMS]
PROMPTS_ON_CPU = [((64, 64), 1, 128), ((64, 128), 1, 64)]
SLICE = 64  # rows that are compared with the reference


def other_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """The peers' ways to make their call of causal attention, and the K and V that it takes.

    Each K head is repeated for the V heads that share it, and both for the heads of q where a peer knows no groups.
    """

    def given(x: Tensor, heads: int) -> Tensor:
        return repeated(x, heads).detach().requires_grad_(q.requires_grad)

    k_twin = given(k, N_V)

    def of_torch(backend: SDPBackend) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor]]:
        attention = partial(peers.sdpa, q, causal=True, backend=backend)
        try:
            attention(k=k_twin, v=v)
            both = k_twin, v
        except RuntimeError:  # it may know no groups
            both = given(k, N_Q), given(v, N_Q)
        return partial(attention, *both), both

    calls: dict[str, Callable] = {name: partial(of_torch, backend) for name, backend in peers.BACKENDS.items()}
    if peers.installed("flash_attn"):
        calls["flash_attn"] = lambda: (partial(peers.flash_attn_prompt, q, k_twin, v), (k_twin, v))
    return calls


def prompt(context: Context, dims: tuple[int, int], batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(context, batch, N_Q, tokens, dims[0]), *cached(context, batch, tokens, dims)


def tflops(op: str, dims: str, value: float, source: str = "") -> Target:
    return target(op, RATE, "≥", value * 1e12, lambda x: x["dims"] == dims and x["tokens"] >= 8192, source)
