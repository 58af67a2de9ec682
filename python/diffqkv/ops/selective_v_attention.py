"""Attention of the newest tokens that reads only some rows of V."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import LAYOUTS, TAILS, SelectiveVStats
from . import dispatch
from .arguments import as_choice, as_integer, as_number, as_scale, refuse_gradients
from .attention import dot_products, fake_out_and_lse, repeat
from .autocast import outside_autocast
from .caches import ROWS, CacheSizes, check_v_stats
from .calls import call
from .checks import any_tensor, wrong
from .decode_attention import DecodeAttentionOptions, check_decode_attention
from .op import Op, shared

DROP, RENORM, MEAN = 0, 1, 2
_MOST_INDICES = 2**27  # places of indices beyond those that the cache can fill: 1 GiB


class SelectiveVAttentionOptions(NamedTuple):
    """The options of `selective_v_attention`."""

    tail: int = DROP
    keep_first: int = 0
    keep_last: int = 0
    v_stats: Tensor | None = None
    cache_start: Tensor | None = None
    block_table: Tensor | None = None
    softmax_scale: float | None = None
    k_layout: int = ROWS
    max_error: float | None = None
    return_bound: bool = False
    return_indices: bool = False


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, top_k: int, options: SelectiveVAttentionOptions
) -> CacheSizes:
    if options.max_error is not None and not options.max_error >= 0:
        raise wrong("max_error", options.max_error, "a number >= 0")
    for name, value, least in (
        ("top_k", top_k, 1),
        ("keep_first", options.keep_first, 0),
        ("keep_last", options.keep_last, 0),
    ):
        if value < least:
            raise wrong(name, value, f"an integer >= {least}")
    if options.tail not in (DROP, RENORM, MEAN):
        raise wrong("tail", options.tail, "0 (drop), 1 (renorm) or 2 (mean)")
    cache = check_decode_attention(q, k_cache, v_cache, cache_seqlens, shared(options, DecodeAttentionOptions))
    most = max(cache.capacity, _MOST_INDICES // max(1, q.shape[:3].numel()))
    if options.return_indices and top_k > most:
        raise wrong("top_k", top_k, f"1 to {most} where indices are asked for")
    check_v_stats(options.v_stats, q, q.shape[0], cache)
    return cache


def _ranks(scores: Tensor, visible: Tensor) -> Tensor:
    """int64 whose order is: visible first, then score, NaN above all, then the smaller index."""
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)  # -0 and +0 are one score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(visible, (ordered.long() << 32) | (0xFFFFFFFF - index), torch.iinfo(torch.int64).min)


def _fetch_rows(v_cache: Tensor, block_table: Tensor | None, n_q: int, positions: Tensor, used: Tensor) -> Tensor:
    """V rows at positions `[b, n_q, s_q, rows]`, zero where not used: `[b, n_q, s_q, rows, d_v]`."""
    b, page_size, groups, per_group = positions.shape[0], v_cache.shape[2], v_cache.shape[1], v_cache.shape[3]
    positions = torch.where(used, positions, 0)
    entry = torch.arange(b, device=positions.device)[:, None, None, None]
    head = (torch.arange(n_q, device=positions.device) * (groups * per_group) // n_q)[:, None, None]
    page, slot = entry, positions
    if block_table is not None:
        page, slot = block_table[entry, positions // page_size], positions % page_size
        page = torch.where(used, page, 0)
    return torch.where(used[..., None], v_cache[page, head // per_group, slot, head % per_group].float(), 0)


def _later_rows(v: Tensor, s_q: int, start: Tensor, cache_seqlens: Tensor) -> Tensor:
    """For each query the sum of the V rows behind it, fewer than s_q: v `[b, n_v, s, d_v]` -> `[b, n_v, s_q, d_v]`."""
    if v.shape[2] == 0:
        return v.new_zeros((*v.shape[:2], s_q, v.shape[3]), dtype=torch.float32)
    newest = cache_seqlens[:, None] - torch.arange(1, max(1, s_q), device=v.device)  # [b, s_q - 1], backwards
    exists = (newest >= start[:, None])[:, None, :, None]
    slot = newest.clamp(0, v.shape[2] - 1).long()[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3])
    return F.pad(torch.where(exists, v.gather(2, slot).float(), 0).cumsum(2), (0, 0, 1, 0)).flip(2)[:, :, :s_q]


def _padded(indices: Tensor, top_k: int) -> Tensor:
    return F.pad(indices, (0, top_k - indices.shape[-1]), value=-1)


def _certified(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, top_k: int, options: SelectiveVAttentionOptions
) -> tuple[Tensor, SelectiveVStats]:
    """The op with max_error, by the reference, whose indices are as wide as top_k."""
    given = options._asdict() | {"tail": TAILS[options.tail], "k_layout": LAYOUTS[options.k_layout]}
    del given["return_bound"], given["return_indices"]
    out, stats = reference.selective_v_attention(
        q, k_cache, v_cache, cache_seqlens, top_k, dtype=torch.float32, **given
    )
    return out.to(q.dtype), stats


def _best_rows(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The positions `[b, n_q, s_q, top_k]` of the best scores, ascending; where a query sees fewer, the capacity."""
    best = _ranks(scores, visible).topk(top_k, dim=-1, sorted=False).indices
    return torch.where(visible.expand_as(scores).gather(-1, best), best, scores.shape[-1]).sort(dim=-1).values


def _rows_to_read(
    best: Tensor, first: Tensor, end: Tensor, capacity: int, keep_first: int, keep_last: int
) -> tuple[Tensor, Tensor]:
    """The positions of the best rows and of those that are forced, and which of them are to be read.

    A query sees the positions [first, end). Its first and last ones are forced, unless they overlap or are among the
    best already.
    """
    b, n_q, s_q, listed = best.shape
    ahead = (first + torch.arange(min(keep_first, capacity), device=best.device)).expand(b, n_q, s_q, -1)
    behind = (end - 1 - torch.arange(min(keep_last, capacity), device=best.device)).expand(b, n_q, s_q, -1)
    is_best = torch.zeros(b, n_q, s_q, capacity + 1, dtype=torch.bool, device=best.device).scatter(-1, best, True)
    rows = torch.cat([best, ahead, behind], dim=-1)
    inside = (rows >= first) & (rows < end)
    forced = torch.cat([ahead < end, (behind - first >= keep_first) & (behind >= first)], dim=-1)
    forced = forced & ~is_best.gather(-1, rows[..., listed:].clamp(0, capacity))
    return rows, inside & torch.cat([torch.ones_like(best, dtype=torch.bool), forced], dim=-1)


def _kept_mass(weights: Tensor, rows_used: Tensor, count: Tensor) -> Tensor:
    """The sum of the weights of the rows that are read: 1 where they are all that a query sees, 0 of none."""
    mass = weights.sum(-1)
    return torch.where((rows_used == count) & ~mass.isnan(), (count > 0).float(), mass)


def _sum_and_norm(v: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the V rows `[b, n_v, d_v]`, and their largest norm `[b, n_v]`."""
    dense = v.float()
    norms = dense.norm(dim=-1)
    return dense.sum(2), norms.amax(-1) if v.shape[2] else norms.sum(-1)


@outside_autocast
def _composed(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    options: SelectiveVAttentionOptions,
    *,
    cache: CacheSizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: out, lse, kept_mass, indices, rows_used, error_bound."""
    tail, cache_start, block_table = options.tail, options.cache_start, options.block_table
    listed_width = top_k if options.return_indices else 0
    if options.max_error is not None:
        known = max(1, min(top_k, cache.capacity))
        out, stats = _certified(q, k_cache, v_cache, cache_seqlens, known, options)
        return out, *stats._replace(indices=_padded(stats.indices, listed_width))
    (_, n_q, s_q, d_k), layout = q.shape, LAYOUTS[options.k_layout]
    start = torch.zeros_like(cache_seqlens) if cache_start is None else cache_start
    k, v = reference.dense_cache(k_cache, v_cache, cache_seqlens, cache_start, block_table, layout)
    capacity = k.shape[2]
    visible = reference.visible_keys(s_q, capacity, cache_seqlens, causal=True, start=start, device=q.device)
    first = start[:, None, None, None].long()
    query = torch.arange(s_q, device=q.device)[:, None]
    end = (query + cache_seqlens[:, None, None, None] - s_q + 1).long().clamp_min(first)  # [b, 1, s_q, 1]

    scale = d_k**-0.5 if options.softmax_scale is None else options.softmax_scale
    scores = dot_products(q, k)
    weights, lse = reference.softmax(scores * scale, visible)
    best = _best_rows(-scores if scale < 0 else scores, visible, min(top_k, capacity))
    rows, used = _rows_to_read(best, first, end, capacity, options.keep_first, options.keep_last)
    rows_used = used.sum(-1)
    count = (end - first)[..., 0].expand_as(rows_used)
    weights = torch.where(used, weights.gather(-1, rows.clamp(0, max(0, capacity - 1))), 0)
    kept_mass = _kept_mass(weights, rows_used, count)
    discarded = torch.where(count > 0, 1 - kept_mass, 0).clamp_min(0)
    out = (weights[..., None, :] @ _fetch_rows(v_cache, block_table, n_q, rows, used))[..., 0, :]
    if tail == RENORM:
        out = torch.where(count[..., None] > 0, out / kept_mass[..., None], out)

    bound = torch.full_like(lse, float("inf"))
    if tail == MEAN or options.return_bound:
        v_stats = options.v_stats
        v_sum, v_norm = _sum_and_norm(v) if v_stats is None else (v_stats[..., :-1], v_stats[..., -1])
        radius = repeat(v_norm, n_q)[:, :, None]
        if tail == RENORM:
            radius = radius + out.norm(dim=-1)
        elif tail == MEAN:
            v_mean = repeat(v_sum[:, :, None] - _later_rows(v, s_q, start, cache_seqlens), n_q)
            v_mean = v_mean / count.clamp_min(1)[..., None]
            out = out + discarded[..., None] * v_mean
            radius = radius + v_mean.norm(dim=-1)
        if options.return_bound:
            bound = torch.where(discarded > 0, discarded * radius, discarded)

    indices = _padded(torch.where(best < capacity, best, -1), listed_width)
    return out.to(q.dtype), lse, kept_mass, indices, rows_used.int(), bound


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, top_k: int,
    options: SelectiveVAttentionOptions, *, cache: CacheSizes,
):  # fmt: skip
    out, lse = fake_out_and_lse(q, cache.d_v)
    indices = q.new_empty((*q.shape[:3], top_k if options.return_indices else 0), dtype=torch.int64)
    return out, lse, torch.empty_like(lse), indices, torch.empty_like(lse, dtype=torch.int32), torch.empty_like(lse)


_OP = dispatch.register(Op("selective_v_attention", check=_check, fake=_fake, composed=_composed))


def selective_v_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    *,
    tail: str = "drop",
    max_error: float | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    v_stats: Tensor | None = None,
    cache_start: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    k_layout: str = "rows",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SelectiveVStats]:
    """`decode_attention` that fetches, for each query row, only the V rows of its best scores (Table 3).

    The softmax runs over all scores. The order is total: dot product descending (float32, before scaling; ascending for
    a negative scale), then index ascending. A row whose top_k reaches all it sees is dense attention.

    Args:
        q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout: as in
            `decode_attention`.
        top_k: V rows that a query row selects, at least 1. It may exceed the cache's capacity, with return_stats as
            long as indices take no more than 1 GiB.
        tail: what becomes of the softmax mass d of the rows that are not read: "drop": nothing is added, as in the
            paper; "renorm": the result is divided by 1 - d; "mean": d times the mean of the V rows that the query sees
            is added.
        max_error: the L2 distance to dense attention that a row of out may have, rounding of out apart. A row reads
            as many more of its best V rows as guarantee it, up to 4 * top_k of them; a row for which those are too few
            reads all of V. Without v_stats this takes one pass over V.
        keep_first, keep_last: rows at the beginning and the end of what a query sees that are read besides the top_k.
        v_stats: float32 `[b, n_v, d_v + 1]` as `kv_cache_update` keeps it. Without it tail "mean" and return_stats
            take one pass over V.
        return_stats: also return a `SelectiveVStats`.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_stats also lse, kept_mass, rows_used and error_bound
        `[b, n_q, s_q]` and indices int64 `[b, n_q, s_q, top_k]`: the cache positions of the top_k best rows, ascending,
        then -1. error_bound bounds the L2 distance of a row of out to dense attention, up to rounding: with Vmax the
        largest norm of a V row, d * Vmax (drop), d * (Vmax + |out|) (renorm), d * (Vmax + |mean V row|) (mean). The
        kernels add 2^-18 to d for the rounding of their sums, unless the row reads all it sees.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode.
        NotImplementedError: forward-mode differentiation.
    """
    if max_error is not None:
        max_error = as_number("max_error", max_error)
    layout = as_choice("k_layout", k_layout, LAYOUTS)
    tail_mode = as_choice("tail", tail, TAILS)
    top_k = as_integer("top_k", top_k, 1)
    keep_first = as_integer("keep_first", keep_first, 0)
    keep_last = as_integer("keep_last", keep_last, 0)
    any_tensor("q", q)
    run = dispatch.uses_kernel(_OP, q, k_layout=layout)
    refuse_gradients("selective_v_attention", q=q, k_cache=k_cache, v_cache=v_cache, v_stats=v_stats)
    options = {
        "tail": tail_mode,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "v_stats": v_stats,
        "cache_start": cache_start,
        "block_table": block_table,
        "softmax_scale": as_scale(softmax_scale),
        "k_layout": layout,
        "max_error": max_error,
        "return_bound": return_stats,
        "return_indices": return_stats,
    }
    op = _OP.kernel if run else _OP.composed
    out, *stats = call(op, q, k_cache, v_cache, cache_seqlens, top_k, **options)
    return (out, SelectiveVStats(*stats)) if return_stats else out
