"""Attention function "diffqkv" for Hugging Face models.

Importing this module registers it, and with it its mask function. Any model whose K and V head counts divide its query
heads can use them with `attn_implementation="diffqkv"`; `SigmaModel` uses it through `DiffqkvAttention`, which also
hands over the cache, so that cached tokens are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from math import gcd
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache as HuggingFaceCache
from transformers.utils import logging

from ..cache import Cache
from ..cache.layers import CacheLayer
from ..ops import decode_attention, flash_attention, flash_attention_varlen, selective_v_attention
from ..ops.autocast import autocast_dtype, cast
from ..ops.dispatch import OPS, uses_kernel
from ..profiling import span
from ..reference import SelectiveVStats, group, ungroup
from .mask import Packing, Spans, packing_of, read_spans
from .stock_attention import KvCache, dense_mask, dense_rows, stock_attention

logger = logging.get_logger(__name__)

# More query tokens than this are a chunk of a prompt, whose attention stays dense.
MAX_DECODE_QUERIES = 16

# The keyword arguments by which transformers tells flash attention of packed sequences, in the order of `Packing`.
_PACKING_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

_Rope = tuple[torch.Tensor, torch.Tensor]

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


class DiffqkvAttention:
    """How a forward pass of a `SigmaModel` stores K and V and attends to them by `diffqkv_attention`.

    It has the protocol that `StockAttention` in modeling_sigma.py describes, and leaves cached tokens where they lie.
    The layer is its `SigmaAttention`, which may come from a file that was saved beside a checkpoint by another release
    of diffqkv: names and meanings of the methods here, and of those that they call of the layer, must not change.
    """

    takes_packed_rows = True  # The bounds of their sequences serve as their mask.
    selects_v_rows = True

    def __init__(self, function: Callable) -> None:
        self.function = function

    @staticmethod
    def packing(begins: torch.Tensor) -> dict[str, Any]:
        """What `attend` is told of packed rows; begins: bool `[b, s]`, True at the first token of each sequence."""
        return dict(zip(_PACKING_KWARGS, packing_of(begins), strict=True))

    def store(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        rope: _Rope,
        cache: HuggingFaceCache | None,
        cache_is_empty: bool,
        cached_rope: _Rope | None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As `StockAttention.store`, but returns the new tokens alone as `[b, heads, t, d]`.

        Where older tokens are to be seen too, what `attend` is told besides has the whole cache.
        """
        if cache is None:
            key, told = layer.key_to_cache(key, rope), {}
        elif _is_written_in_place(cache, key, value):
            key, told = self._append(layer, key, value, rope, cache.layers[layer.layer_idx], cache_is_empty)
        else:
            key, told = self._update(layer, key, value, rope, cache, cache_is_empty)
        if layer.expands_k:
            key = layer.key_from_cache(key, rope)
            if "kv_cache" in told:
                told["kv_cache"] = _expanded(layer, told["kv_cache"], cached_rope)
        return key.transpose(1, 2), value.transpose(1, 2), told

    def attend(self, layer: torch.nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Calls the function with what `store` returned."""
        return self.function(layer, *args, **kwargs)

    @staticmethod
    def _append(
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        rope: _Rope,
        cached: CacheLayer,
        cache_is_empty: bool,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The protocol of `diffqkv.Cache`: one op writes K and V in place, and rotates a K that is only read there."""
        rotates_on_write = not (cache_is_empty or layer.expands_k)
        if not rotates_on_write:
            key = layer.key_to_cache(key, rope)
        # Under autocast K may have another 16-bit dtype than cos and sin.
        angles = [x if x.dtype == torch.float32 else x.to(key.dtype) for x in rope] if rotates_on_write else ()
        cached.append(key.transpose(1, 2), value.transpose(1, 2), *angles)
        told: dict[str, Any] = {"v_stats": cached.v_stats}
        if cache_is_empty:
            return key, told
        kv_cache = cached.k_cache, cached.v_cache, cached.k_layout
        if layer.expands_k:
            keys, _ = cached.dense()
            kv_cache = group(keys, cached.shape.groups), cached.v_cache[:, :, : keys.shape[2]], "rows"
        return key, told | {"kv_cache": kv_cache}

    @staticmethod
    def _update(
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        rope: _Rope,
        cache: HuggingFaceCache,
        cache_is_empty: bool,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The protocol of the caches of transformers: they take K as it will be read, and return all slots."""
        key = layer.key_to_cache(key, rope)
        keys, values = layer.update_cache(cache, key, value)
        return key, {} if cache_is_empty else {"kv_cache": (keys, values, "rows")}


def _is_written_in_place(cache: HuggingFaceCache, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the ops write into the cache: they know no graph, and a cache that they write keeps none."""
    records_graph = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    return isinstance(cache, Cache) and key.dtype in OPS["kv_cache_update"].dtypes and not records_graph


def _expanded(layer: torch.nn.Module, kv_cache: KvCache, rope: _Rope) -> KvCache:
    """The cache in rows, with its small, un-rotated keys taken to head_dim and rotated."""
    keys, values, k_layout = kv_cache
    keys = layer.key_from_cache(ungroup(keys), rope, unsqueeze_dim=1)
    return group(keys, values.shape[1]), values, k_layout


class Route(Enum):
    """The functions that compute attention "diffqkv", by their names."""

    STOCK = "stock_attention"
    FLASH = "flash_attention"
    VARLEN = "flash_attention_varlen"
    DECODE = "decode_attention"
    SELECTIVE_V = "selective_v_attention"


def route(
    *,
    has_dense_mask: bool = False,
    wants_weights: bool = False,
    records_graph: bool = False,
    drops_out: bool = False,
    is_causal: bool = True,
    is_prompt: bool = True,
    is_packed: bool = False,
    has_varlen_kernel: bool = True,
    can_decode: bool = True,
    selects_v: bool = False,
    is_compiling: bool = False,
) -> Route:
    """Which function computes a call of `diffqkv_attention`.

    Args:
        has_dense_mask, wants_weights: what no op knows.
        records_graph, drops_out, is_causal, can_decode: whether the step needs, or has a dtype, that the ops for
            inference do not know; `flash_attention` then reads the cache as dense K and V.
        is_prompt: whether K and V are the tokens of the queries, without older ones.
        is_packed: whether rows hold several sequences, and has_varlen_kernel, whether a kernel computes these.
        selects_v: whether a step asks for V rows to be selected.
        is_compiling: whether torch.compile traces the call. A dense mask then serves three cases: dropout, whose seed
            must be drawn for each call; graphs of cached steps, whose K and V cannot be cut to the slots in use; and
            packed rows in plain torch, which pads as many entries as there are tokens.
    """
    needs_stock = has_dense_mask or wants_weights
    if is_compiling:
        needs_stock = needs_stock or drops_out or (records_graph and not is_prompt)
        needs_stock = needs_stock or (is_packed and not has_varlen_kernel)
    if needs_stock:
        return Route.STOCK
    if is_packed:
        return Route.VARLEN
    if is_prompt or records_graph or drops_out or not is_causal or not can_decode:
        return Route.FLASH
    return Route.SELECTIVE_V if selects_v else Route.DECODE


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
            FlashAttention: those of all rows, one row after another. The last three have defaults.
        output_attentions: return the probabilities too, computed densely.

    Returns:
        out `[b, s_q, n_q, d_v]`, and the probabilities `[b, n_q, s_q, s]` or None.

    Raises:
        NotImplementedError: packed sequences with cached tokens; selective V with softcap, sinks or a window.
    """
    query, key, value = _as_under_autocast(query, key, value)
    has_spans = attention_mask is not None and attention_mask.dtype == torch.int32
    spans = read_spans(attention_mask) if has_spans else None
    # A mask of spans is causal, whatever the module says of itself.
    causal = has_spans or (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_prompt = kv_cache is None and key.shape[2] == query.shape[2]
    packing = _packing_in(kwargs, query.shape[0] * query.shape[2])
    if packing is not None and not is_prompt:
        raise NotImplementedError("cu_seq_lens_q: packed sequences with cached tokens are not built")
    seen = _seen(spans, sliding_window if attention_mask is None and causal else None, packing)
    call = _Call(query, key, value, kv_cache, attention_mask, seen, causal, dropout, scaling, softcap, s_aux)
    inputs = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    has_dense_mask = attention_mask is not None and (
        spans is None or seen.packing is not None and seen.start is not None
    )
    wants_weights = bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))
    selects_v = selective_v is not None and not is_prompt and query.shape[2] <= MAX_DECODE_QUERIES
    taken = route(
        has_dense_mask=has_dense_mask,
        wants_weights=wants_weights,
        records_graph=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        drops_out=dropout > 0,
        is_causal=causal,
        is_prompt=is_prompt,
        is_packed=seen.packing is not None,
        has_varlen_kernel=seen.packing is None or uses_kernel(OPS["flash_attention_varlen"], *inputs),
        can_decode=query.dtype in OPS["decode_attention"].dtypes,
        selects_v=selects_v,
        is_compiling=torch.compiler.is_compiling(),
    )
    _warn(taken, has_dense_mask, selects_v)
    with span("attention", getattr(module, "layer_idx", 0), query):
        if taken is Route.STOCK:
            return _stock(module, call, wants_weights)
        if taken is Route.VARLEN:
            return _varlen(call), None
        if taken is Route.FLASH:
            return _flash(call, is_prompt), None
        if taken is Route.DECODE:
            return _decode(call), None
        return _select_v(module, call, selective_v, v_stats), None


def _as_under_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype that autocast gives SDPA: rotations may have left Q and K in float32."""
    dtype = autocast_dtype(tensors[0].device.type)
    return list(tensors) if dtype is None else [cast(x, dtype) for x in tensors]


def _seen(spans: Spans | None, sliding_window: int | None, packing: Packing | None) -> Spans:
    """The keys that are seen: what a mask says, if there is one of spans, and what the other arguments say."""
    if spans is None:
        return Spans(None, None, None, sliding_window - 1 if sliding_window else -1, packing)
    return spans if packing is None else spans._replace(packing=packing)


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


def _warn(taken: Route, has_dense_mask: bool, selects_v: bool) -> None:
    """Says what is slower than it was asked to be."""
    if torch.compiler.is_compiling():
        return
    if selects_v and taken is not Route.SELECTIVE_V:
        logger.warning_once(
            "selective_v: a step that records gradients, returns probabilities, computes in float64 or has a mask that "
            "is not one causal span of keys per row reads all V rows"
        )
    if has_dense_mask:
        logger.warning_once(
            "attention 'diffqkv': the mask is not one span of keys per row (holes, or a mask of another kind); "
            "stock attention with K and V expanded to equal heads computes this forward pass"
        )


class _Call(NamedTuple):
    """The arguments of `diffqkv_attention`, as the function of each route takes them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: KvCache | None
    mask: torch.Tensor | None
    seen: Spans
    causal: bool
    dropout: float
    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None


def _stock(module: torch.nn.Module, call: _Call, wants_weights: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    query, mask, seen = call.query, call.mask, call.seen
    key, value = dense_rows(call.key, call.value, call.kv_cache, mask)
    mask = dense_mask(mask, query.shape, key.shape[2], query.device, call.causal, seen.window, seen.packing)
    options = {"dropout": call.dropout, "scaling": call.scaling, "causal": call.causal}
    options |= {"softcap": call.softcap, "sinks": call.sinks, "wants_weights": wants_weights}
    return stock_attention(module, query, key, value, mask, **options)


def _logits(call: _Call) -> dict[str, Any]:
    """What the dense ops are told of the logits."""
    window = (call.seen.window, -1)
    return {"softmax_scale": call.scaling, "window": window, "softcap": call.softcap or 0.0, "sinks": call.sinks}


def _varlen(call: _Call) -> torch.Tensor:
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (call.query, call.key, call.value))
    out = flash_attention_varlen(*rows, *call.seen.packing, causal=call.causal, dropout_p=call.dropout, **_logits(call))
    return out.unflatten(0, (call.query.shape[0], call.query.shape[2]))


def _flash(call: _Call, is_prompt: bool) -> torch.Tensor:
    key, value, end = call.key, call.value, call.seen.end
    if not is_prompt:
        key, value = dense_rows(key, value, call.kv_cache, call.mask)
        end = None  # All slots of these rows are written.
    options = {"causal": call.causal, "kv_start": call.seen.start, "kv_end": end, "dropout_p": call.dropout}
    return flash_attention(call.query, key, value, **options, **_logits(call)).transpose(1, 2)


def _cached(call: _Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """k_cache, v_cache, cache_seqlens and k_layout, as the ops for steps take them."""
    kv_cache, total = call.kv_cache, call.seen.total
    if kv_cache is None:
        groups = gcd(call.key.shape[1], call.value.shape[1])
        kv_cache = group(call.key, groups), group(call.value, groups), "rows"
    k_cache, v_cache, k_layout = kv_cache
    if total is None:
        total = torch.full((call.query.shape[0],), v_cache.shape[2], dtype=torch.int32, device=call.query.device)
    return k_cache, v_cache, total, k_layout


def _decode(call: _Call) -> torch.Tensor:
    *cache, k_layout = _cached(call)
    options = {"cache_start": call.seen.start, "k_layout": k_layout}
    return decode_attention(call.query, *cache, **options, **_logits(call)).transpose(1, 2)


def _select_v(
    module: torch.nn.Module,
    call: _Call,
    selective_v: dict[str, Any],
    v_stats: Callable[[], torch.Tensor] | None,
) -> torch.Tensor:
    unbuilt = {"window": call.seen.window >= 0, "softcap": call.softcap, "sinks": call.sinks is not None}
    for name, is_wanted in unbuilt.items():
        if is_wanted:
            raise NotImplementedError(f"{name}: not built for selective V")
    is_recorded = _records is not None
    if is_recorded and torch.compiler.is_compiling():
        raise NotImplementedError("record_selective_v: not built for compiled code")
    *cache, k_layout = _cached(call)
    options = {"cache_start": call.seen.start, "k_layout": k_layout, "softmax_scale": call.scaling}
    needs_v_stats = selective_v.get("tail") == "mean" or selective_v.get("max_error") is not None or is_recorded
    # The statistics of the cache count every slot that was written: left padding too.
    if v_stats is not None and needs_v_stats and call.seen.start is None:
        options["v_stats"] = v_stats()
    out = selective_v_attention(call.query, *cache, **selective_v, **options, return_stats=is_recorded)
    if is_recorded:
        out, stats = out
        _records.append((module.layer_idx, stats))
    return out.transpose(1, 2)


# Models that find this on an attention function use it through `DiffqkvAttention`; those of files that earlier releases
# saved call it themselves, with K and V of unequal heads, kv_cache, v_stats and packed rows without a mask.
diffqkv_attention.takes_unequal_heads = True
AttentionInterface.register("diffqkv", diffqkv_attention)
