"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`: unpadded dims, a multiply-add counts two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import readable


def attention_flops(b: int, n_q: int, s_q: int, s_k: int, d_k: int, d_v: int, causal: bool = False) -> int:
    """The FLOPs of q @ K^T and weights @ V; half of it if causal, as is the custom, whatever s_q and s_k are."""
    flops = 2 * b * n_q * s_q * s_k * (d_k + d_v)
    return flops // 2 if causal else flops


def _backward_flops(b: int, n_q: int, s_q: int, s_k: int, d_k: int, d_v: int, causal: bool = False) -> int:
    """The scores once more, and dq, dk of d_k terms; the gradient of the weights and dv, of d_v terms."""
    return attention_flops(b, n_q, s_q, s_k, 3 * d_k, 2 * d_v, causal)


@register_flop_formula(torch.ops.diffqkv.flash_attention)
def _flash_attention(q, k, v, causal=False, *args, out_shape=None, **kwargs) -> int:
    b, n_q, s_q, d_k = q
    return attention_flops(b, n_q, s_q, k[2], d_k, v[3], causal)


@register_flop_formula(torch.ops.diffqkv.flash_attention_backward)
def _flash_attention_backward(dout, dlse, q, k, v, out, lse, causal=False, *args, out_shape=None, **kwargs) -> int:
    b, n_q, s_q, d_k = q
    return _backward_flops(b, n_q, s_q, k[2], d_k, v[3], causal)


def _pairs(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int) -> int:
    """Scores per head; from above where cu_seqlens are not known."""
    if not readable(cu_seqlens_q) or not readable(cu_seqlens_k):
        return q.shape[0] * max_seqlen_k
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())


@register_flop_formula(torch.ops.diffqkv.flash_attention_varlen, get_raw=True)
def _flash_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, *args, out_val=None, **kwargs
) -> int:
    pairs = _pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
    return attention_flops(1, q.shape[1], 1, pairs, q.shape[2], v.shape[2], causal)


@register_flop_formula(torch.ops.diffqkv.flash_attention_varlen_backward, get_raw=True)
def _flash_attention_varlen_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False,
    *args, out_val=None, **kwargs,
) -> int:  # fmt: skip
    pairs = _pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
    return _backward_flops(1, q.shape[1], 1, pairs, q.shape[2], v.shape[2], causal)


@register_flop_formula(torch.ops.diffqkv.decode_attention)
def _decode_attention(q, k_cache, v_cache, *args, block_table=None, out_shape=None, **kwargs) -> int:
    """Counts the capacity of the cache: how much of it is in use is a value, not a shape."""
    b, n_q, s_q, d_k = q
    s_k = v_cache[2] if block_table is None else v_cache[2] * block_table[1]
    return attention_flops(b, n_q, s_q, s_k, d_k, v_cache[4])
