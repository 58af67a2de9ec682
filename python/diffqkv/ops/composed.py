"""The ops in plain torch, for devices without a kernel and for installations without the compiled library.

Signatures and results are those of the op schemas. K is repeated to a common head count for
`scaled_dot_product_attention`, which reads a group's K once per V head: right everywhere, fast nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .checks import CacheSizes, checked, gcd, readable
from .options import MEAN, PANELS, RENORM, ROWS, AttentionOptions, DecodeOptions, SelectiveVOptions, UpdateOptions
from .rules.autocast import outside_autocast

_SCORE_BYTES = 256 * 2**20  # of the float32 scores that the lse holds at a time


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Dot products in float32, or float64 of float64, `[b, n_q, s_q, s_k]`; K is not repeated."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    per_k = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], per_k)).flatten(2, 3).to(dtype)
    return (rows @ k.to(dtype).transpose(2, 3)).unflatten(2, (per_k, q.shape[2])).flatten(1, 2)


def _lse(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    b, n_q, s_q, _ = q.shape
    rows = max(1, _SCORE_BYTES // (4 * max(1, b * n_q * k.shape[2])))
    parts = []
    for start in range(0, max(1, s_q), rows):
        logits = _scores(q[:, :, start : start + rows], k) * scale
        if visible is not None:
            logits = logits.masked_fill(~visible[:, :, start : start + rows], float("-inf"))
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, dim=2)


@torch.library.custom_op("diffqkv::dropout_mask", mutates_args=())
def _dropout_mask(
    b: int, n_q: int, s_q: int, s_k: int, dropout_p: float, seed: int, offset: int, device: torch.device
) -> Tensor:
    """An op, so that inductor does not trace into Philox: its code for one round is three times that of the last."""
    return reference.dropout_mask(b, n_q, s_q, s_k, dropout_p, seed, offset, device)


@_dropout_mask.register_fake
def _(b, n_q, s_q, s_k, dropout_p, seed, offset, device):
    return torch.empty((b, n_q, s_q, s_k), dtype=torch.bool, device=device)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    square_causal: bool,
    need_lse: bool,
    options: AttentionOptions | DecodeOptions,
) -> tuple[Tensor, Tensor | None]:
    """visible: bool, broadcastable to `[b, n_q, s_q, s_k]`, or None; square_causal: the mask of s_q = s_k.

    SDPA where it knows the options. softcap, sinks and dropout are plain mathematics, with all scores in memory.
    """
    (b, n_q, s_q, d_k), n_k, s_k, n_v = q.shape, k.shape[1], k.shape[2], v.shape[1]
    scale, softcap, sinks = options.softmax_scale, options.softcap, options.sinks
    dropout_p = options.dropout_p if isinstance(options, AttentionOptions) else 0.0
    if softcap != 0 or sinks is not None or dropout_p != 0:
        kept = None
        if dropout_p != 0:
            kept = _dropout_mask(b, n_q, s_q, s_k, dropout_p, options.seed, options.offset, q.device)
        if visible is None:
            visible = reference.visible_keys(s_q, s_k, s_k, device=q.device)
        exact = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k, v))
        out, lse = reference.attend(*exact, visible, scale, softcap, sinks, dropout_p, kept)
        return out.to(q.dtype), lse
    heads = n_k * n_v // gcd(n_k, n_v)  # lcm
    scale = d_k**-0.5 if scale is None else scale
    mask, nothing = None, None
    if visible is not None and not square_causal:
        # What SDPA returns for a row that sees nothing depends on its back-end, and its gradients are NaN in some.
        nothing = ~visible.any(-1, keepdim=True)
        mask = visible | nothing
    out = F.scaled_dot_product_attention(
        q,
        _repeat(k, heads),
        _repeat(v, heads),
        attn_mask=mask,
        is_causal=square_causal,
        scale=scale,
        enable_gqa=True if heads != n_q else False,  # a plain bool also where torch.compile has dynamic sizes
    )
    if nothing is not None:
        out = out.masked_fill(nothing, 0)
    return out.contiguous(), _lse(q, k, visible, scale) if need_lse else None


@outside_autocast
@checked
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The op, differentiable by torch. With need_lse=False it leaves out the lse and the second pass over K."""
    causal, kv_start, kv_end = options.causal, options.kv_start, options.kv_end
    window = options.window_left, options.window_right
    s_q, s_k = q.shape[2], k.shape[2]
    masked = kv_start is not None or kv_end is not None or window != (-1, -1)
    visible = None
    if masked or causal:
        visible = reference.visible_keys(
            s_q, s_k, s_k, causal=causal, window=window, start=kv_start, end=kv_end, device=q.device
        )
    k, v = reference.keep_keys(k, kv_start, kv_end), reference.keep_keys(v, kv_start, kv_end)
    square_causal = True if causal and s_q == s_k and not masked else False  # a plain bool, as above
    return _attend(q, k, v, visible, square_causal, need_lse, options)


def _unpack(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[total, heads, d]` -> `[b, heads, longest, d]`; what lies behind the end of an entry is of no meaning."""
    row = cu_seqlens[:-1, None] + torch.arange(longest, device=x.device)
    return F.pad(x, (0, 0, 0, 0, 0, 1))[row.clamp(0, x.shape[0])].transpose(1, 2)


@outside_autocast
@checked
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The op, differentiable by torch: the entries are padded to max_seqlen_q and max_seqlen_k."""
    kv_start, kv_end = options.kv_start, options.kv_end
    total = q.shape[0]
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    end = lengths_k if kv_end is None else torch.minimum(kv_end, lengths_k)
    visible = reference.visible_keys(
        max_seqlen_q, max_seqlen_k, lengths_k - lengths_q + max_seqlen_q, causal=options.causal,
        window=(options.window_left, options.window_right), start=kv_start, end=end, device=q.device,
    )  # fmt: skip
    k, v = (reference.keep_keys(_unpack(x, cu_seqlens_k, max_seqlen_k), kv_start, end) for x in (k, v))
    out, lse = _attend(_unpack(q, cu_seqlens_q, max_seqlen_q), k, v, visible, False, need_lse, options)
    token = torch.arange(total, device=q.device)
    entry = torch.searchsorted(cu_seqlens_q[1:], token, right=True)
    index = token - cu_seqlens_q[entry]
    return out[entry, :, index], None if lse is None else lse[entry, :, index].T.contiguous()


def _crop(k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, k_layout: int) -> tuple[Tensor, Tensor]:
    """The part of a contiguous cache that holds tokens."""
    longest = int(cache_seqlens.max()) if cache_seqlens.numel() else 0
    in_k = longest if k_layout == ROWS else -(-longest // reference.PANEL_TOKENS)
    return k_cache[:, :, :in_k], v_cache[:, :, :longest]


@outside_autocast
@checked
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    options: DecodeOptions,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The op. With need_lse=False it leaves out the lse."""
    start, table = options.cache_start, options.block_table
    if table is None and readable(cache_seqlens):
        k_cache, v_cache = _crop(k_cache, v_cache, cache_seqlens, options.k_layout)
    k, v = reference.dense_cache(k_cache, v_cache, cache_seqlens, start, table, reference.LAYOUTS[options.k_layout])
    window = options.window_left, options.window_right
    visible = reference.visible_keys(
        q.shape[2], k.shape[2], cache_seqlens, causal=True, window=window, start=start, device=q.device
    )
    return _attend(q, k, v, visible, False, need_lse, options)


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


@outside_autocast
@checked
def selective_v_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    options: SelectiveVOptions,
    *,
    cache: CacheSizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: out, lse, kept_mass, indices, rows_used, error_bound."""
    tail, keep_first, keep_last, v_stats = options.tail, options.keep_first, options.keep_last, options.v_stats
    cache_start, block_table, softmax_scale = options.cache_start, options.block_table, options.softmax_scale
    layout, listed_width = reference.LAYOUTS[options.k_layout], top_k if options.return_indices else 0
    if options.max_error is not None:
        known = max(1, min(top_k, cache.capacity))
        shared = options._asdict() | {"tail": reference.TAILS[tail], "k_layout": layout, "dtype": torch.float32}
        del shared["return_bound"], shared["return_indices"]
        out, stats = reference.selective_v_attention(q, k_cache, v_cache, cache_seqlens, known, **shared)
        return out.to(q.dtype), *stats._replace(indices=_padded(stats.indices, listed_width))
    b, n_q, s_q, d_k = q.shape
    start = torch.zeros_like(cache_seqlens) if cache_start is None else cache_start
    k, v = reference.dense_cache(k_cache, v_cache, cache_seqlens, cache_start, block_table, layout)
    capacity = k.shape[2]
    visible = reference.visible_keys(s_q, capacity, cache_seqlens, causal=True, start=start, device=q.device)
    first = start[:, None, None, None].long()
    query = torch.arange(s_q, device=q.device)[:, None]
    end = (query + cache_seqlens[:, None, None, None] - s_q + 1).long().clamp_min(first)  # [b, 1, s_q, 1]
    count = end - first

    scale = d_k**-0.5 if softmax_scale is None else softmax_scale
    scores = _scores(q, k)
    weights, lse = reference._softmax(scores * scale, visible)

    listed = min(top_k, capacity)
    best = _ranks(-scores if scale < 0 else scores, visible).topk(listed, dim=-1, sorted=False).indices
    best = torch.where(visible.expand_as(scores).gather(-1, best), best, capacity).sort(dim=-1).values
    # Forced rows: the first ones and the last ones, unless they overlap or are among the best already.
    ahead = (first + torch.arange(min(keep_first, capacity), device=q.device)).expand(b, n_q, s_q, -1)
    behind = (end - 1 - torch.arange(min(keep_last, capacity), device=q.device)).expand(b, n_q, s_q, -1)
    is_best = torch.zeros(b, n_q, s_q, capacity + 1, dtype=torch.bool, device=q.device).scatter(-1, best, True)
    rows = torch.cat([best, ahead, behind], dim=-1)
    inside = (rows >= first) & (rows < end)
    forced = torch.cat([ahead < end, (behind - first >= keep_first) & (behind >= first)], dim=-1)
    forced = forced & ~is_best.gather(-1, rows[..., listed:].clamp(0, capacity))
    used = inside & torch.cat([torch.ones_like(best, dtype=torch.bool), forced], dim=-1)
    rows_used = used.sum(-1)

    weights = torch.where(used, weights.gather(-1, rows.clamp(0, max(0, capacity - 1))), 0)
    kept_mass = weights.sum(-1)
    count = count[..., 0].expand_as(rows_used)
    kept_mass = torch.where((rows_used == count) & ~kept_mass.isnan(), (count > 0).float(), kept_mass)
    discarded = torch.where(count > 0, 1 - kept_mass, 0).clamp_min(0)
    out = (weights[..., None, :] @ _fetch_rows(v_cache, block_table, n_q, rows, used))[..., 0, :]
    if tail == RENORM:
        out = torch.where(count[..., None] > 0, out / kept_mass[..., None], out)

    bound = torch.full_like(lse, float("inf"))
    if tail == MEAN or options.return_bound:
        if v_stats is None:
            dense = v.float()
            norms = dense.norm(dim=-1)
            v_sum, v_norm = dense.sum(2), norms.amax(-1) if capacity else norms.sum(-1)
        else:
            v_sum, v_norm = v_stats[..., :-1], v_stats[..., -1]
        radius = _repeat(v_norm, n_q)[:, :, None]
        if tail == RENORM:
            radius = radius + out.norm(dim=-1)
        elif tail == MEAN:
            v_mean = _repeat(v_sum[:, :, None] - _later_rows(v, s_q, start, cache_seqlens), n_q)
            v_mean = v_mean / count.clamp_min(1)[..., None]
            out = out + discarded[..., None] * v_mean
            radius = radius + v_mean.norm(dim=-1)
        if options.return_bound:
            bound = torch.where(discarded > 0, discarded * radius, discarded)

    indices = _padded(torch.where(best < capacity, best, -1), listed_width)
    return out.to(q.dtype), lse, kept_mass, indices, rows_used.int(), bound


@checked
def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    options: UpdateOptions,
    *,
    cache: CacheSizes,
) -> None:
    """The op; no data-dependent shape, so it neither synchronises nor breaks a graph."""
    block_table, v_stats = options.block_table, options.v_stats
    if positions.numel() == 0 or cache.capacity == 0 or cache.pages == 0:
        return
    if options.cos is not None:
        k = reference.rotate(k, options.cos, options.sin).to(k_cache.dtype)
    positions = positions.long()
    written = (positions >= 0) & (positions < cache.capacity)
    slot = positions.clamp(0, cache.capacity - 1)
    page = torch.arange(len(positions), device=k.device)[:, None].expand_as(slot)
    if block_table is not None:
        page, slot = block_table.long().gather(1, slot // cache.page_size), slot % cache.page_size
        written = written & (page >= 0) & (page < cache.pages)
        page = page.clamp(0, cache.pages - 1)
    # A token that is not written repeats the write of one that is; if there is none, it writes back what is there.
    written, page, slot = written.flatten(), page.flatten(), slot.flatten()
    source = torch.where(written, torch.arange(len(written), device=k.device), written.byte().argmax())
    page, slot = page[source], slot[source]
    at_k = (page, slice(None), slot)
    if options.k_layout == PANELS:
        panel, token = slot // reference.PANEL_TOKENS, slot % reference.PANEL_TOKENS
        at_k = (page, slice(None), panel, slice(None), token)
    for x_cache, at, x in ((k_cache, at_k, k), (v_cache, (page, slice(None), slot), v)):
        now = x_cache[at]  # [tokens, G, heads / G, d]; K panels: [tokens, n_k, d] or [tokens, n_k, d / 2, 2]
        new = x.transpose(1, 2).flatten(0, 1)[source].reshape(now.shape)
        x_cache[at] = torch.where(written.any(), new, now)
    if v_stats is not None:
        rows = torch.where(written.view_as(positions)[:, None, :, None], v.float(), 0)
        v_stats[..., :-1] += rows.sum(2)
        v_stats[..., -1] = torch.maximum(v_stats[..., -1], rows.norm(dim=-1).amax(2))


@checked
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The op, differentiable through torch's own autograd."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@checked
def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The op: the gradients of gate and up."""
    g, u, d = gate.float(), up.float(), dout.float()
    sigmoid = torch.sigmoid(g)
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype), (d * (g * sigmoid)).to(gate.dtype)
