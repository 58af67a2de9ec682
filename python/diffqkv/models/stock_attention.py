"""Attention that the ops cannot compute: with dense masks, with its probabilities, and compiled with dropout."""

from __future__ import annotations

from math import lcm

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import reference
from ..reference import panels_to_rows, ungroup, visible_keys
from .mask import Packing, spans_to_mask

KvCache = tuple[torch.Tensor, torch.Tensor, str]  # k_cache, v_cache, k_layout


def dense_rows(
    key: torch.Tensor, value: torch.Tensor, kv_cache: KvCache | None, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K `[b, n_k, s, d_k]` and V `[b, n_v, s, d_v]` of the slots that the mask speaks of; from kv_cache, if given."""
    if kv_cache is not None:
        k_cache, v_cache, k_layout = kv_cache
        key = panels_to_rows(k_cache) if k_layout == "panels" else ungroup(k_cache)
        value = ungroup(v_cache)
    # A pre-allocated cache holds more slots, which may be NaN; caches that can be compiled hold zeros there.
    visible = key.shape[2]
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        visible = min(visible, attention_mask.shape[-1])
    elif attention_mask is not None and not torch.compiler.is_compiling():
        visible = min(visible, int(attention_mask[..., 2].max()))
    return key[:, :, :visible], value[:, :, :visible]


def dense_mask(
    attention_mask: torch.Tensor | None,
    query_shape: torch.Size,
    s_k: int,
    device: torch.device,
    causal: bool,
    window: int,
    packing: Packing | None,
) -> torch.Tensor | None:
    """The mask `[b or 1, 1, s_q, s_k]`, bool or additive; None: causal over s_q = s_k keys, or nothing is hidden.

    An attention_mask says itself what is causal and where windows end.
    """
    b, _, s_q, _ = query_shape
    mask = attention_mask
    if mask is not None:
        mask = spans_to_mask(mask, s_q, s_k) if mask.dtype == torch.int32 else mask[..., :s_k]
    elif causal and (s_q != s_k or window >= 0 or packing is not None):
        mask = visible_keys(s_q, s_k, s_k, causal=True, window=(window, -1), device=device)
    if packing is None:
        return mask
    tokens = torch.arange(b * s_q, device=device)
    sequence = torch.searchsorted(packing.cu_seqlens_q, tokens, right=True).view(b, 1, s_q)
    together = sequence[..., :, None] == sequence[..., None, :]
    if mask is None or mask.dtype == torch.bool:
        return together if mask is None else mask & together
    return mask.masked_fill(~together, torch.finfo(mask.dtype).min)


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
    wants_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q `[b, n_q, s_q, d_k]` over the results of `dense_rows` under that of `dense_mask`.

    SDPA computes it, or plain mathematics what SDPA does not know: softcap, sinks, and probabilities as a result.
    Returns out `[b, s_q, n_q, d_v]` and, if wants_weights, the probabilities `[b, n_q, s_q, s_k]`, else None.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if wants_weights or softcap or sinks is not None:
        weights = _probabilities(query, key, mask, scaling, causal, softcap, sinks)
        weights = F.dropout(weights, dropout)
        out = (weights @ _repeat(value, query.shape[1])).transpose(1, 2)
        return out, weights if wants_weights else None
    heads = lcm(key.shape[1], value.shape[1])
    key, value = _repeat(key, heads), _repeat(value, heads)
    if query.shape[-1] < value.shape[-1]:
        # Zero dimensions change no score, and torch's fused kernels want d_k = d_v.
        padding = [0, value.shape[-1] - query.shape[-1]]
        query, key = F.pad(query, padding), F.pad(key, padding)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal)


def _repeat(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The probabilities `[b, n_q, s_q, s_k]` in the dtype of query, without those of the sinks.

    Torch's softmax is faster than that of `reference.attend`, which knows no additive mask besides.
    """
    scores = reference.dot_products(query, key) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is None and causal:
        mask = visible_keys(*scores.shape[-2:], key.shape[2], causal=True, device=scores.device)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return probabilities[..., : key.shape[2]]
