"""What is measured: the attention of one Sigma-1.5B layer, its GQA-16 twin, and what torch makes of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import diffqkv

N_Q, N_K, N_V, D = 32, 4, 16, 64
# A model that walks through its layers finds none of their caches in the L3; a smaller working set would stay there,
# where no layout saves anything.
POOL_BYTES = 512 << 20

T = TypeVar("T")


class Size(NamedTuple):
    tokens: int
    batch: int = 1
    prompt: bool = False  # all tokens are new, not the last one alone
    fused: bool = False  # the model is fused for inference

    def __str__(self) -> str:
        tokens = f"prompt of {self.tokens}" if self.prompt else str(self.tokens)
        return tokens + (f", batch {self.batch}" if self.batch > 1 else "") + (", fused" if self.fused else "")


def heads(count: int, tokens: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    """Random `[batch, count, tokens, D]`."""
    return torch.randn(batch, count, tokens, D).to(dtype)


def rotating(nbytes: int, build: Callable[[], T]) -> Iterator[T]:
    """Goes round and round through POOL_BYTES of objects of `nbytes` each."""
    return cycle([build() for _ in range(-(-POOL_BYTES // nbytes))])


def cache_layer(k: Tensor, v: Tensor) -> diffqkv.cache.CacheLayer:
    """A full `diffqkv.Cache` of one layer: k `[b, n_k, s, D]` and v `[b, n_v, s, D]`, as the CPU likes them."""
    cache = diffqkv.Cache([(k.shape[1], D, v.shape[1], D)], max_length=k.shape[2])
    cache.append(k, v, 0)
    return cache.layers[0]


def rotating_layers(k: Tensor, v: Tensor) -> Iterator[diffqkv.cache.CacheLayer]:
    return rotating(k.nbytes + v.nbytes, lambda: cache_layer(k, v))


def rotating_rows(k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """k and v as torch caches them: `[b, heads, s, D]`."""
    return rotating(k.nbytes + v.nbytes, lambda: (k.clone(), v.clone()))


def decode_layer(q: Tensor, layer: diffqkv.cache.CacheLayer, lengths: Tensor) -> Tensor:
    return diffqkv.decode_attention(q, layer.k_cache, layer.v_cache, lengths, k_layout=layer.k_layout)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """torch's attention; K with fewer heads than V is repeated first, as a user of this shape has to do."""
    if k.shape[1] < v.shape[1]:
        k = k.repeat_interleave(v.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _grouped_weights(q: Tensor, k: Tensor, n_v: int) -> Tensor:
    """Softmax weights `[b, n_v, n_q / n_v, s]` of q `[b, n_q, 1, D]`; the q heads of a K head are rows of a matrix."""
    scores = q.unflatten(1, (k.shape[1], -1)).squeeze(3) @ k.transpose(2, 3) * D**-0.5
    return scores.softmax(-1).flatten(1, 2).unflatten(1, (n_v, -1))


def matmul_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decode attention by matrix products that read each K and V head once: the fastest that plain torch does."""
    return (_grouped_weights(q, k, v.shape[1]) @ v).flatten(1, 2).unsqueeze(2)


def matmul_top_k(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> Tensor:
    """`matmul_decode` with the V rows of the top_k best scores alone."""
    weights, rows = _grouped_weights(q, k, v.shape[1]).topk(top_k)
    chosen = v.gather(2, rows.flatten(2)[..., None].expand(-1, -1, -1, D)).unflatten(2, rows.shape[2:])
    return (weights[..., None, :] @ chosen).flatten(1, 2)
