"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`: unpadded dims, a multiply-add counts two."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula


def attention_flops(b: int, n_q: int, s_q: int, s_k: int, d_k: int, d_v: int, causal: bool = False) -> int:
    """Of q @ K^T and weights @ V; half of it if causal, as is the custom, whatever s_q and s_k are."""
    flops = 2 * b * n_q * s_q * s_k * (d_k + d_v)
    return flops // 2 if causal else flops


@register_flop_formula(torch.ops.diffqkv.flash_attention)
def _flash_attention(q, k, v, *args, causal=False, out_shape=None, **kwargs) -> int:
    b, n_q, s_q, d_k = q
    return attention_flops(b, n_q, s_q, k[2], d_k, v[3], causal)


@register_flop_formula(torch.ops.diffqkv.decode_attention)
def _decode_attention(q, k_cache, v_cache, *args, block_table=None, out_shape=None, **kwargs) -> int:
    """Counts the capacity of the cache: how much of it is in use is a value, not a shape."""
    b, n_q, s_q, d_k = q
    s_k = v_cache[2] if block_table is None else v_cache[2] * block_table[1]
    return attention_flops(b, n_q, s_q, s_k, d_k, v_cache[4])
