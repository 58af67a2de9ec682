"""What is measured: the attention of one Sigma-1.5B layer and its GQA-16 twin, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import diffqkv

from ..common.inputs import N_K, N_Q, N_V, D
from ..common.timing import Calls, Clock, pool

CLOCK = Clock()


class Size(NamedTuple):
    tokens: int
    batch: int = 1
    prompt: bool = False  # all tokens are new, not the last one alone
    weights: str = ""  # the form that `fuse_for_inference` gives a model; "": as it was loaded

    def __str__(self) -> str:
        tokens = f"prompt of {self.tokens}" if self.prompt else str(self.tokens)
        return (
            tokens + (f", batch {self.batch}" if self.batch > 1 else "") + (f", {self.weights}" if self.weights else "")
        )


def heads(count: int, tokens: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    """Random `[batch, count, tokens, D]`."""
    return torch.randn(batch, count, tokens, D).to(dtype)


class Decode:
    """Attention of the newest token of each sequence: q, k and v of Sigma, and the K of the twin."""

    def __init__(self, size: Size, dtype: torch.dtype):
        self.q = heads(N_Q, 1, dtype, size.batch)
        self.k, self.v, self.k_twin = (heads(n, size.tokens, dtype, size.batch) for n in (N_K, N_V, N_V))
        self.lengths = torch.full((size.batch,), size.tokens, dtype=torch.int32)

    def want(self) -> Tensor:
        return diffqkv.reference.attention(self.q.double(), self.k.double(), self.v.double())

    def ours(self, layer: diffqkv.cache.CacheLayer) -> Tensor:
        return diffqkv.decode_attention(self.q, layer.k_cache, layer.v_cache, self.lengths, k_layout=layer.k_layout)


def cache_layer(k: Tensor, v: Tensor) -> diffqkv.cache.CacheLayer:
    """A full `diffqkv.Cache` of one layer: k `[b, n_k, s, D]` and v `[b, n_v, s, D]`, as the CPU likes them."""
    cache = diffqkv.Cache([(k.shape[1], D, v.shape[1], D)], max_length=k.shape[2])
    cache.append(k, v, 0)
    return cache.layers[0]


def cache_layers(k: Tensor, v: Tensor) -> list[diffqkv.cache.CacheLayer]:
    """The layers of a cache that take turns."""
    return pool(CLOCK, k.nbytes + v.nbytes, lambda: cache_layer(k, v))


def rows(k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """k and v as torch caches them, `[b, heads, s, D]`, in the layers that take turns."""
    return pool(CLOCK, k.nbytes + v.nbytes, lambda: (k.clone(), v.clone()))


def on_each(data: list, call: Callable) -> Calls:
    """The call on each of the data."""
    return [partial(call, x) for x in data]
