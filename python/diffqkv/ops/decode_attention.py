"""Attention of the newest tokens with a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import LAYOUTS
from . import checks, dispatch
from .arguments import as_choice, as_number, as_scale, as_window, refuse_gradients
from .attention import AttentionOptions, attend, attention_flops, check_options, fake_out_and_lse
from .autocast import outside_autocast
from .caches import ROWS, CacheSizes, check_blocks_of_tokens, check_cache
from .calls import call
from .checks import Sizes, any_tensor, wrong
from .op import Op, shared


class DecodeAttentionOptions(NamedTuple):
    """The options of `decode_attention`."""

    cache_start: Tensor | None = None
    block_table: Tensor | None = None
    softmax_scale: float | None = None
    k_layout: int = ROWS
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None


def check_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeAttentionOptions
) -> CacheSizes:
    sizes = Sizes()
    checks.rows("q", q, q, sizes, "b n_q s_q d_k")
    start, table = options.cache_start, options.block_table
    cache = check_cache(q, sizes["b"], k_cache, v_cache, table, options.k_layout)
    if cache.d_k != sizes["d_k"]:
        raise wrong("q", f"head dimension {sizes['d_k']}", f"that of k_cache, {cache.d_k}")
    checks.heads("k_cache", cache.n_k, sizes["n_q"])
    checks.heads("v_cache", cache.n_v, sizes["n_q"])
    checks.per_entry("cache_seqlens", cache_seqlens, q, sizes)
    checks.values("cache_seqlens", cache_seqlens, 0, cache.capacity, f"0 to the cache's {cache.capacity} tokens")
    if start is not None:
        checks.per_entry("cache_start", start, q, sizes)
        checks.values("cache_start", start, 0, torch.iinfo(torch.int32).max, "0 or more")
    if table is not None and checks.readable(table):
        check_blocks_of_tokens(table, cache.page_size, start, cache_seqlens, cache.pages)
    check_options(q, sizes, shared(options, AttentionOptions))
    return cache


def _crop(k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, k_layout: int) -> tuple[Tensor, Tensor]:
    """The part of a contiguous cache that holds tokens."""
    longest = int(cache_seqlens.max()) if cache_seqlens.numel() else 0
    in_k = longest if k_layout == ROWS else -(-longest // reference.PANEL_TOKENS)
    return k_cache[:, :, :in_k], v_cache[:, :, :longest]


@outside_autocast
def _composed(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    options: DecodeAttentionOptions,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The op. With need_lse=False it leaves out the lse."""
    start, table = options.cache_start, options.block_table
    if table is None and checks.readable(cache_seqlens):
        k_cache, v_cache = _crop(k_cache, v_cache, cache_seqlens, options.k_layout)
    k, v = reference.dense_cache(k_cache, v_cache, cache_seqlens, start, table, LAYOUTS[options.k_layout])
    window = options.window_left, options.window_right
    visible = reference.visible_keys(
        q.shape[2], k.shape[2], cache_seqlens, causal=True, window=window, start=start, device=q.device
    )
    return attend(q, k, v, visible, False, need_lse, shared(options, AttentionOptions))


def _fake(q: Tensor, *rest, cache: CacheSizes):
    return fake_out_and_lse(q, cache.d_v)


def _flops(q: Tensor, v_cache: Tensor, block_table: Tensor | None = None, **rest) -> int:
    """Counts the capacity of the cache: how much of it is in use is a value, not a shape."""
    b, n_q, s_q, d_k = q.shape
    s_k = v_cache.shape[2] if block_table is None else v_cache.shape[2] * block_table.shape[1]
    return attention_flops(b, n_q, s_q, s_k, d_k, v_cache.shape[4])


_OP = dispatch.register(
    Op("decode_attention", check=check_decode_attention, fake=_fake, composed=_composed, flops=_flops)
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cache_start: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_layout: str = "rows",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens with everything cached; K is read once per group. For inference only.

    Args:
        q: `[b, n_q, s_q, d_k]`: the last s_q of the cached tokens, causal among themselves.
        k_cache: k_layout "rows": `[b, G, s, n_k / G, d_k]`, so that a plain `[b, n_k, s, d_k]` cache is a free view;
            "panels": `[b, n_k, ceil(s / 32), d_k, 32]` (float32, float16) or
            `[b, n_k, ceil(s / 32), d_k / 2, 32, 2]` (bfloat16), contiguous inside a panel.
        v_cache: `[b, G, s, n_v / G, d_v]`.
        cache_seqlens: int32 `[b]`, 0 to s: tokens in the cache, those of q included. Slots behind them may be NaN.
        cache_start: int32 `[b]`: first slot that counts, for left padding.
        block_table: int32 `[b, max_blocks]`. Then the first dimension of the caches counts blocks, s is the number of
            tokens of a block (a multiple of 32 in panels), and token t of entry i lies in block
            `block_table[i, t // s]`. Entries that no token needs may hold anything.
        softmax_scale: factor of the scores; d_k ** -0.5 by default.
        window, softcap, sinks: as in `flash_attention`.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_lse also lse `[b, n_q, s_q]`, float32, natural logarithm.
        A query that sees no key gets out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode. The contents of
            cache_seqlens, cache_start and block_table are checked on the CPU.
        NotImplementedError: forward-mode differentiation.
    """
    layout = as_choice("k_layout", k_layout, LAYOUTS)
    any_tensor("q", q)
    run = dispatch.uses_kernel(_OP, q, k_layout=layout)
    refuse_gradients("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    left, right = as_window(window)
    options = {
        "cache_start": cache_start,
        "block_table": block_table,
        "softmax_scale": as_scale(softmax_scale),
        "k_layout": layout,
        "window_left": left,
        "window_right": right,
        "softcap": as_number("softcap", softcap),
        "sinks": sinks,
    }
    if run:
        out, lse = call(_OP.kernel, q, k_cache, v_cache, cache_seqlens, **options)
    else:
        out, lse = _OP.composed(q, k_cache, v_cache, cache_seqlens, need_lse=return_lse, **options)
    return (out, lse) if return_lse else out
