"""Shapes and dtypes of the compiled ops' results, for fake and meta tensors: torch.compile, export, opcheck."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._checks import ROWS


def _out_and_lse(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], d_v)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("diffqkv::flash_attention")
def _(q, k, v, *, causal=False, softmax_scale=None, kv_start=None, kv_end=None):
    _checks.flash_attention(q, k, v, kv_start, kv_end)
    return _out_and_lse(q, v.shape[3])


@torch.library.register_fake("diffqkv::decode_attention")
def _(
    q, k_cache, v_cache, cache_seqlens, *, cache_start=None, block_table=None, softmax_scale=None, k_layout=ROWS
):  # fmt: skip
    cache = _checks.decode_attention(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, k_layout)
    return _out_and_lse(q, cache.d_v)


@torch.library.register_fake("diffqkv::kv_cache_update")
def _(
    k_cache, v_cache, k, v, positions, *, cos=None, sin=None, block_table=None, v_stats=None, k_layout=ROWS
):  # fmt: skip
    _checks.kv_cache_update(k_cache, v_cache, k, v, positions, cos, sin, block_table, v_stats, k_layout)


@torch.library.register_fake("diffqkv::selective_v_attention")
def _(
    q, k_cache, v_cache, cache_seqlens, top_k, *, tail=0, keep_first=0, keep_last=0, v_stats=None, cache_start=None,
    block_table=None, softmax_scale=None, k_layout=ROWS, max_error=None, return_bound=False,
):  # fmt: skip
    cache = _checks.selective_v_attention(
        q, k_cache, v_cache, cache_seqlens, top_k, tail, keep_first, keep_last, v_stats, cache_start, block_table,
        k_layout, max_error,
    )  # fmt: skip
    out, lse = _out_and_lse(q, cache.d_v)
    indices = q.new_empty((*q.shape[:3], top_k), dtype=torch.int64)
    return out, lse, torch.empty_like(lse), indices, torch.empty_like(lse, dtype=torch.int32), torch.empty_like(lse)


@torch.library.register_fake("diffqkv::swiglu")
def _(gate, up):
    _checks.swiglu(gate, up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("diffqkv::swiglu_backward")
def _(dout, gate, up):
    _checks.swiglu(gate, up, dout)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
