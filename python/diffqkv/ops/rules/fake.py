"""Shapes and dtypes of the compiled ops' results, for fake and meta tensors: torch.compile, export, opcheck."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..checks import ROWS


def _out_and_lse(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], d_v)), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsinks


def _sinks(causal=False, softmax_scale=None, window_left=-1, window_right=-1, softcap=0.0, sinks=None, *rest, **named):
    """The one among the options of attention, in the order of the schemas."""
    return sinks


@torch.library.register_fake("diffqkv::flash_attention")
def _(q, k, v, *options, **named):
    checks.flash_attention(q, k, v, *options, **named)
    return _out_and_lse(q, v.shape[3])


@torch.library.register_fake("diffqkv::flash_attention_backward")
def _(dout, dlse, q, k, v, out, lse, *options, **named):
    checks.flash_attention(q, k, v, *options, **named)
    checks.gradients(q, dout, dlse, out, lse, (*q.shape[:3], v.shape[3]), tuple(q.shape[:3]))
    return _gradients(q, k, v, _sinks(*options, **named))


@torch.library.register_fake("diffqkv::flash_attention_varlen")
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named):
    checks.flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named)
    total, n_q, _ = q.shape
    return q.new_empty((total, n_q, v.shape[2])), q.new_empty((n_q, total), dtype=_lse_dtype(q))


@torch.library.register_fake("diffqkv::flash_attention_varlen_backward")
def _(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named):
    checks.flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named)
    total, n_q, _ = q.shape
    checks.gradients(q, dout, dlse, out, lse, (total, n_q, v.shape[2]), (n_q, total))
    return _gradients(q, k, v, _sinks(*options, **named))


@torch.library.register_fake("diffqkv::decode_attention")
def _(
    q, k_cache, v_cache, cache_seqlens, *, cache_start=None, block_table=None, softmax_scale=None, k_layout=ROWS,
    **options,
):  # fmt: skip
    cache = checks.decode_attention(
        q, k_cache, v_cache, cache_seqlens, cache_start, block_table, k_layout, softmax_scale=softmax_scale, **options
    )
    return _out_and_lse(q, cache.d_v)


@torch.library.register_fake("diffqkv::kv_cache_update")
def _(
    k_cache, v_cache, k, v, positions, *, cos=None, sin=None, block_table=None, v_stats=None, k_layout=ROWS
):  # fmt: skip
    checks.kv_cache_update(k_cache, v_cache, k, v, positions, cos, sin, block_table, v_stats, k_layout)


@torch.library.register_fake("diffqkv::selective_v_attention")
def _(
    q, k_cache, v_cache, cache_seqlens, top_k, *, tail=0, keep_first=0, keep_last=0, v_stats=None, cache_start=None,
    block_table=None, softmax_scale=None, k_layout=ROWS, max_error=None, return_bound=False,
    return_indices=False,
):  # fmt: skip
    cache = checks.selective_v_attention(
        q, k_cache, v_cache, cache_seqlens, top_k, tail, keep_first, keep_last, v_stats, cache_start, block_table,
        k_layout, max_error, softmax_scale, return_indices,
    )  # fmt: skip
    out, lse = _out_and_lse(q, cache.d_v)
    indices = q.new_empty((*q.shape[:3], top_k if return_indices else 0), dtype=torch.int64)
    return out, lse, torch.empty_like(lse), indices, torch.empty_like(lse, dtype=torch.int32), torch.empty_like(lse)


@torch.library.register_fake("diffqkv::swiglu")
def _(gate, up):
    checks.swiglu(gate, up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("diffqkv::swiglu_backward")
def _(dout, gate, up):
    checks.swiglu(gate, up, dout)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
