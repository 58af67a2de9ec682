"""Shapes and dtypes of the compiled ops' results, for fake and meta tensors: torch.compile, export, opcheck."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import CacheSizes, checked
from ..options import AttentionOptions, SelectiveVOptions


def _fake(function: Callable) -> Callable:
    """Registers function as the fake kernel of the op of its name."""
    torch.library.register_fake(f"diffqkv::{function.__name__}")(checked(function))
    return function


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _out_and_lse(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], d_v)), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _gradients(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, ...]:
    sinks = options.sinks
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsinks


@_fake
def flash_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions):
    return _out_and_lse(q, v.shape[3])


@_fake
def flash_attention_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest):
    return _gradients(q, k, v, rest[-1])


@_fake
def flash_attention_varlen(q: Tensor, k: Tensor, v: Tensor, *rest):
    total, n_q, _ = q.shape
    return q.new_empty((total, n_q, v.shape[2])), q.new_empty((n_q, total), dtype=_lse_dtype(q))


@_fake
def flash_attention_varlen_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest):
    return _gradients(q, k, v, rest[-1])


@_fake
def decode_attention(q: Tensor, *rest, cache: CacheSizes):
    return _out_and_lse(q, cache.d_v)


@_fake
def kv_cache_update(*rest) -> None:
    return None


@_fake
def selective_v_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, top_k: int, options: SelectiveVOptions, *,
    cache: CacheSizes,
):  # fmt: skip
    out, lse = _out_and_lse(q, cache.d_v)
    indices = q.new_empty((*q.shape[:3], top_k if options.return_indices else 0), dtype=torch.int64)
    return out, lse, torch.empty_like(lse), indices, torch.empty_like(lse, dtype=torch.int32), torch.empty_like(lse)


@_fake
def swiglu(gate: Tensor, up: Tensor):
    return gate.new_empty(gate.shape)


@_fake
def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
