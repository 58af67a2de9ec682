"""Packages that some machines have."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_PAGE = 16


def module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def flash_attn_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    """All `[b, heads, s, d]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with_kvcache = import_module("flash_attn").flash_attn_with_kvcache
    return lambda: with_kvcache(q, k, v, cache_seqlens=lengths).transpose(1, 2)


def flash_attn_prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return import_module("flash_attn").flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """On pages of a cache of its own."""
    b, heads, s, d = k.shape
    pages = tuple(x.transpose(1, 2).reshape(-1, _PAGE, heads, d) for x in (k, v))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    each = s // _PAGE
    first = torch.arange(b + 1, dtype=torch.int32, device=q.device) * each
    index = torch.arange(b * each, dtype=torch.int32, device=q.device)
    last = torch.full((b,), _PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(first, index, last, q.shape[1], heads, d, _PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
    query = q[:, :, 0].contiguous()
    return lambda: wrapper.run(query, pages)[:, :, None]
