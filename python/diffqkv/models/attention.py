"""Attention and mask function "diffqkv" for Hugging Face models.

Importing this module registers both. Any model whose K and V head counts divide its query heads can use them with
`attn_implementation="diffqkv"`; `SigmaModel` also hands over its cache, so that cached tokens are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, lcm

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.utils import logging

from ..ops import decode_attention, flash_attention, selective_v_attention
from ..reference import group, panels_to_rows, ungroup

logger = logging.get_logger(__name__)

# More query tokens than this are a chunk of a prompt, whose attention stays dense.
MAX_DECODE_QUERIES = 16


def diffqkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """The spans of keys that exist, int32 `[b, 1, 1, 3]`: first slot, end, and slots written including padding.

    Four dimensions keep a second pass through the mask code from taking the result for a padding mask; int32 tells it
    from a dense mask. Where one span per row cannot say it (packed rows, windows, holes in the padding mask), and in
    grad mode, where SDPA computes the attention, the result is the dense bool mask `[b, 1, q_length, kv_length]` of
    `sdpa_mask`, or None for plain causal attention over q_length keys.
    """

    def dense(allow_is_causal_skip: bool) -> torch.Tensor | None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **{**kwargs, "allow_is_causal_skip": allow_is_causal_skip},
        )

    may_skip = kwargs.get("allow_is_causal_skip", True) and kv_length == q_length
    if mask_function is not causal_mask_function or kv_offset != 0 or torch.is_grad_enabled():
        return dense(may_skip and mask_function is causal_mask_function)

    # A static cache passes its live counter as q_offset: used here at once, never kept.
    total = torch.zeros(batch_size, dtype=torch.int32, device=device) + (q_offset + q_length)
    total = total.to(torch.int32)
    if attention_mask is None:
        start, end = torch.zeros_like(total), total
        return _pack_spans(start, end, total, padded=False)

    slots = torch.arange(attention_mask.shape[-1], dtype=torch.int32, device=device)
    valid = (attention_mask & (slots < total[:, None])).to(torch.int32)
    start = valid.argmax(-1).to(torch.int32)
    end = ((slots + 1) * valid).amax(-1)
    padded = True
    if not torch.compiler.is_compiling():
        count = valid.sum(-1)
        # Cached steps know no end but the newest slot: a mask that hides it cannot be said by a span either.
        one_span = (count == end - start) & ((end == total) | (kv_length == q_length))
        is_one_span, is_full = torch.stack([one_span.all(), (count == total).all()]).tolist()
        if not is_one_span:
            return dense(False)
        padded = not is_full
    return _pack_spans(start, end, total, padded)


def _pack_spans(start: torch.Tensor, end: torch.Tensor, total: torch.Tensor, padded: bool) -> torch.Tensor:
    spans = torch.stack([start, end, total], -1)[:, None, None]
    if not torch.compiler.is_compiling():
        # What every layer would otherwise split off again.
        spans.diffqkv_spans = (start, end, total) if padded else (None, None, total)
    return spans


def _split_spans(spans: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    known = None if torch.compiler.is_compiling() else getattr(spans, "diffqkv_spans", None)
    if known is not None:
        return known
    return tuple(column.contiguous() for column in spans[:, 0, 0].unbind(-1))


def diffqkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    kv_cache: tuple[torch.Tensor, torch.Tensor, str] | None = None,
    v_stats: Callable[[], torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of query `[b, n_q, s_q, d_k]` over key `[b, n_k, s, d_k]` and value `[b, n_v, s, d_v]`.

    Prompts run through `flash_attention`, cached steps through `decode_attention`, or `selective_v_attention` where
    `module.selective_v_top_k` is set. SDPA with K and V expanded to equal heads takes over while a graph is recorded,
    under dropout, and for dense masks.

    Args:
        attention_mask: what `diffqkv_mask` returns, a dense mask `[b, 1, s_q, s]` (bool or additive), or None: causal,
            the queries being the last tokens.
        kv_cache: k_cache, v_cache and k_layout as `decode_attention` takes them, with the newest tokens in it. key and
            value are not read then.
        v_stats: returns the cache's statistics of V as `selective_v_attention` takes them; called if they are of use.
        output_attentions: return the probabilities too, computed densely.

    Returns:
        out `[b, s_q, n_q, d_v]`, and the probabilities `[b, n_q, s_q, s]` or None.

    Raises:
        NotImplementedError: softcap, sinks (`s_aux`), packed sequences that come without their position_ids.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: not built for attention 'diffqkv'")
    has_spans = attention_mask is not None and attention_mask.dtype == torch.int32
    has_dense_mask = attention_mask is not None and not has_spans
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None and len(boundaries) > 2 and not has_dense_mask:
        raise NotImplementedError("cu_seq_lens_q: packed sequences without position_ids are not built")

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    wants_weights = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    records_graph = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_prompt = kv_cache is None and key.shape[2] == query.shape[2]
    if wants_weights or records_graph or dropout or has_dense_mask or not (causal or is_prompt):
        if has_dense_mask and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                "attention 'diffqkv': the mask is not one span of keys per row (packed rows, a window, holes or a 4-D "
                "mask); this forward pass uses SDPA with K and V expanded to equal heads"
            )
        return _dense_attention(
            module, query, key, value, attention_mask, dropout, scaling, causal, kv_cache, wants_weights
        )

    start, end, total = _split_spans(attention_mask) if has_spans else (None, None, None)
    if is_prompt:
        out = flash_attention(query, key, value, causal=causal, softmax_scale=scaling, kv_start=start, kv_end=end)
        return out.transpose(1, 2), None

    if kv_cache is None:
        groups = gcd(key.shape[1], value.shape[1])
        kv_cache = group(key, groups), group(value, groups), "rows"
    k_cache, v_cache, k_layout = kv_cache
    if total is None:
        total = torch.full((query.shape[0],), v_cache.shape[2], dtype=torch.int32, device=query.device)
    options = {"cache_start": start, "softmax_scale": scaling, "k_layout": k_layout}
    top_k = getattr(module, "selective_v_top_k", 0)
    if top_k and query.shape[2] <= MAX_DECODE_QUERIES:
        options["tail"] = module.selective_v_tail
        # They count every slot that was written: left padding too.
        if v_stats is not None and module.selective_v_tail == "mean" and start is None:
            options["v_stats"] = v_stats()
        out = selective_v_attention(query, k_cache, v_cache, total, top_k, **options)
    else:
        out = decode_attention(query, k_cache, v_cache, total, **options)
    return out.transpose(1, 2), None


def _dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    kv_cache: tuple[torch.Tensor, torch.Tensor, str] | None,
    wants_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kv_cache is not None:
        k_cache, v_cache, k_layout = kv_cache
        key = panels_to_rows(k_cache) if k_layout == "panels" else ungroup(k_cache)
        value = ungroup(v_cache)
    s_q, s_k = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        attention_mask = spans_to_mask(attention_mask, s_q, int(attention_mask[..., 2].max()))
    if attention_mask is None:
        if causal and s_q != s_k:
            attention_mask = torch.ones(s_q, s_k, dtype=torch.bool, device=key.device).tril(s_k - s_q)[None, None]
    else:
        # A pre-allocated cache holds more slots than the mask speaks of, a fresh prompt fewer.
        visible = min(s_k, attention_mask.shape[-1])
        attention_mask = attention_mask[..., :visible]
        key, value = key[:, :, :visible], value[:, :, :visible]

    heads = lcm(key.shape[1], value.shape[1])
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if wants_weights:
        return _eager_attention(module, query, key, value, attention_mask, dropout, scaling, causal)
    if query.shape[-1] < value.shape[-1]:
        # Zero dimensions change no score, and torch's fused kernels want d_k = d_v.
        padding = [0, value.shape[-1] - query.shape[-1]]
        query, key = F.pad(query, padding), F.pad(key, padding)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal
    )


def _eager_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def spans_to_mask(spans: torch.Tensor, s_q: int, s_k: int) -> torch.Tensor:
    """The dense bool mask `[b, 1, s_q, s_k]` of `diffqkv_mask`'s spans: True where a query sees a key."""
    start, end, total = (column[:, :, :, None] for column in spans.unbind(-1))
    slots = torch.arange(s_k, device=spans.device)
    last_visible = total - s_q + torch.arange(s_q, device=spans.device)[:, None]
    return (slots >= start) & (slots < end) & (slots <= last_visible)


AttentionInterface.register("diffqkv", diffqkv_attention)
AttentionMaskInterface.register("diffqkv", diffqkv_mask)
