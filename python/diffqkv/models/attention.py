"""Attention function "diffqkv" for Hugging Face models.

Importing this module registers it, and with it its mask function. Any model whose K and V head counts divide its query
heads can use them with `attn_implementation="diffqkv"`; `SigmaModel` also hands over its cache, so that cached tokens
are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.utils import logging

from ..ops import decode_attention, flash_attention, flash_attention_varlen, selective_v_attention
from ..ops.dispatch import KERNEL_DTYPES, uses_kernel
from ..ops.rules.autocast import autocast_dtype, cast
from ..reference import SelectiveVStats, group
from .mask import Packing, read_spans
from .stock_attention import KvCache, dense_mask, dense_rows, stock_attention

logger = logging.get_logger(__name__)

# More query tokens than this are a chunk of a prompt, whose attention stays dense.
MAX_DECODE_QUERIES = 16

_records: list[tuple[int, SelectiveVStats]] | None = None


@contextmanager
def record_selective_v() -> Iterator[list[tuple[int, SelectiveVStats]]]:
    """Collects (layer_idx, statistics) of each call that selects V rows, of all models, while the context is open.

    `kept_mass` tells how much of the softmax the rows that were read hold, `rows_used` how many they were, and
    `error_bound` how far from dense attention the result can be. They cost a pass over V where the cache keeps no
    statistics of its own: `diffqkv.Cache` does, except for left-padded rows.
    """
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def diffqkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kv_cache: KvCache | None = None,
    v_stats: Callable[[], torch.Tensor] | None = None,
    selective_v: dict[str, Any] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of query `[b, n_q, s_q, d_k]` over key `[b, n_k, s, d_k]` and value `[b, n_v, s, d_v]`.

    Prompts and training run through `flash_attention`, packed rows through `flash_attention_varlen`, cached steps
    through `decode_attention`, or `selective_v_attention` where selective_v is given. Stock attention with K and V
    expanded to equal heads computes what the ops cannot: dense masks, probabilities as a result, and under
    torch.compile dropout, whose seed is drawn for each call, cached steps that record a graph, and packed rows on
    devices without a kernel.

    Args:
        attention_mask: what `diffqkv_mask` returns, a dense mask `[b, 1, s_q, s]` (bool or additive), or None: causal,
            the queries being the last tokens.
        sliding_window: tokens that a query sees, its own included, where attention_mask is None: masks say it too.
        softcap: as in `flash_attention`.
        s_aux: sinks `[n_q]`, as in `flash_attention`.
        kv_cache: k_cache, v_cache and k_layout as `decode_attention` takes them, with the newest tokens in it. key and
            value are not read then.
        v_stats: returns the cache's statistics of V as `selective_v_attention` takes them; called if they are of use.
        selective_v: top_k, and any of tail, max_error, keep_first and keep_last, of `selective_v_attention`, for cached
            steps of at most 16 tokens. What is computed by another op, or by stock attention, reads all V rows.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as transformers passes them to
            FlashAttention: those of all rows, one row behind another. The last three have defaults.
        output_attentions: return the probabilities too, computed densely.

    Returns:
        out `[b, s_q, n_q, d_v]`, and the probabilities `[b, n_q, s_q, s]` or None.

    Raises:
        NotImplementedError: packed sequences with cached tokens; selective V with softcap, sinks or a window.
    """
    query, key, value = _as_under_autocast(query, key, value)
    is_compiling = torch.compiler.is_compiling()
    has_spans = attention_mask is not None and attention_mask.dtype == torch.int32
    spans = read_spans(attention_mask) if has_spans else None
    # A mask of spans is causal, whatever the module says of itself.
    causal = has_spans or (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_prompt = kv_cache is None and key.shape[2] == query.shape[2]
    packing = _packing_in(kwargs, query.shape[0] * query.shape[2])
    if packing is not None and not is_prompt:
        raise NotImplementedError("cu_seq_lens_q: packed sequences with cached tokens are not built")
    window = sliding_window - 1 if sliding_window and attention_mask is None and causal else -1

    is_dense = attention_mask is not None and (spans is None or packing is not None and spans.start is not None)
    wants_weights = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    inputs = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    records_graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    packs_in_torch = packing is not None and not uses_kernel("flash_attention_varlen", *inputs)
    can_decode = query.dtype in KERNEL_DTYPES["decode_attention"]
    is_left_to_torch = is_compiling and (dropout or records_graph and not is_prompt or packs_in_torch)
    is_step = selective_v is not None and not is_prompt and query.shape[2] <= MAX_DECODE_QUERIES
    reads_all = is_dense or wants_weights or records_graph or dropout or not causal or not can_decode
    if is_step and not is_compiling and reads_all:
        logger.warning_once(
            "selective_v: a step that records gradients, returns probabilities, computes in float64 or has a mask that "
            "is not one causal span of keys per row reads all V rows"
        )
    if is_dense or wants_weights or is_left_to_torch:
        if is_dense and not is_compiling:
            logger.warning_once(
                "attention 'diffqkv': the mask is not one span of keys per row (holes, or a mask of another kind); "
                "stock attention with K and V expanded to equal heads computes this forward pass"
            )
        key, value = dense_rows(key, value, kv_cache, attention_mask)
        mask = dense_mask(attention_mask, query.shape, key.shape[2], query.device, causal, window, packing)
        options = {"dropout": dropout, "scaling": scaling, "causal": causal, "softcap": softcap, "sinks": s_aux}
        return stock_attention(module, query, key, value, mask, wants_weights=wants_weights, **options)

    start, end, total = None, None, None
    if spans is not None:
        start, end, total, window = spans[:4]
        packing = packing or spans.packing
    logits = {"softmax_scale": scaling, "window": (window, -1), "softcap": softcap or 0.0, "sinks": s_aux}
    if packing is not None:
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = flash_attention_varlen(*rows, *packing, causal=causal, dropout_p=dropout, **logits)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    if is_prompt or not causal or records_graph or dropout or not can_decode:
        if not is_prompt:
            key, value = dense_rows(key, value, kv_cache, attention_mask)
            end = None  # all slots of these rows are written
        options = {"causal": causal, "kv_start": start, "kv_end": end, "dropout_p": dropout}
        return flash_attention(query, key, value, **options, **logits).transpose(1, 2), None

    if kv_cache is None:
        groups = gcd(key.shape[1], value.shape[1])
        kv_cache = group(key, groups), group(value, groups), "rows"
    return _decode(module, query, kv_cache, start, total, selective_v, v_stats, logits).transpose(1, 2), None


def _as_under_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype that autocast gives SDPA: rotations may have left Q and K in float32."""
    dtype = autocast_dtype(tensors[0].device.type)
    return list(tensors) if dtype is None else [cast(x, dtype) for x in tensors]


def _packing_in(kwargs: dict[str, Any], tokens: int) -> Packing | None:
    """The packed sequences in transformers' keyword arguments of flash attention."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return None
    defaults = {"cu_seq_lens_k": cu_seqlens, "max_length_q": tokens, "max_length_k": tokens}
    given = {name: kwargs[name] for name in defaults if kwargs.get(name) is not None}
    cu_seqlens_k, *longest = (defaults | given).values()
    longest = (int(x) if isinstance(x, torch.Tensor) else x for x in longest)
    return Packing(cu_seqlens.to(torch.int32), cu_seqlens_k.to(torch.int32), *longest)


def _decode(
    module: torch.nn.Module,
    query: torch.Tensor,
    kv_cache: KvCache,
    start: torch.Tensor | None,
    total: torch.Tensor | None,
    selective_v: dict[str, Any] | None,
    v_stats: Callable[[], torch.Tensor] | None,
    logits: dict[str, Any],
) -> torch.Tensor:
    k_cache, v_cache, k_layout = kv_cache
    if total is None:
        total = torch.full((query.shape[0],), v_cache.shape[2], dtype=torch.int32, device=query.device)
    options = {"cache_start": start, "k_layout": k_layout}
    if selective_v is None or query.shape[2] > MAX_DECODE_QUERIES:
        return decode_attention(query, k_cache, v_cache, total, **options, **logits)
    unbuilt = {"window": logits["window"][0] >= 0, "softcap": logits["softcap"], "sinks": logits["sinks"] is not None}
    for name, is_wanted in unbuilt.items():
        if is_wanted:
            raise NotImplementedError(f"{name}: not built for selective V")
    if _records is not None and torch.compiler.is_compiling():
        raise NotImplementedError("record_selective_v: not built for compiled code")
    options |= selective_v | {"softmax_scale": logits["softmax_scale"], "return_stats": _records is not None}
    needs_v_stats = (
        selective_v.get("tail") == "mean" or selective_v.get("max_error") is not None or options["return_stats"]
    )
    # They count every slot that was written: left padding too.
    if v_stats is not None and needs_v_stats and start is None:
        options["v_stats"] = v_stats()
    out = selective_v_attention(query, k_cache, v_cache, total, **options)
    if _records is None:
        return out
    out, stats = out
    _records.append((module.layer_idx, stats))
    return out


# Read by models: it takes K and V with head counts of their own, a cache in place, and packed rows without a mask.
diffqkv_attention.takes_unequal_heads = True
AttentionInterface.register("diffqkv", diffqkv_attention)
