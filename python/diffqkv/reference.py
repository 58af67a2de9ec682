"""What every op computes, in plain torch: the specification that the kernels are tested against.

q head i reads K head `i * n_k // n_q` and V head `i * n_v // n_q` (SIGMA, eq. 16 and 17). Everything is computed and
returned in float64 where the inputs are float64, else in float32; `dtype` overrides that. Slots of a cache that hold no
token may hold anything, NaN included.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The ops' schemas have the index for the name.
LAYOUTS = ("rows", "panels")
TAILS = ("drop", "renorm", "mean")

PANEL_TOKENS = 32
MAX_ADDED = 4


class SelectiveVStats(NamedTuple):
    """What `selective_v_attention` did, for each query row; shapes `[b, n_q, s_q]`."""

    lse: Tensor  # natural logarithm of the softmax denominator over all visible keys
    kept_mass: Tensor  # softmax mass of the V rows used
    indices: Tensor  # int64 [b, n_q, s_q, top_k]: cache positions of the top_k best rows, ascending, then -1
    rows_used: Tensor  # int32: V rows used, those that keep_first and keep_last forced included
    error_bound: Tensor  # bound of the L2 distance to dense attention; +inf where it was not asked for


# ---- layouts ---------------------------------------------------------------------------------------------------------


def ungroup(grouped: Tensor) -> Tensor:
    """`[pages, G, s, heads / G, d]` -> `[pages, heads, s, d]`."""
    return grouped.transpose(2, 3).flatten(1, 2)


def group(x: Tensor, groups: int) -> Tensor:
    """`[pages, heads, s, d]` -> `[pages, G, s, heads / G, d]`, a view."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(2, 3)


def panels_to_rows(panels: Tensor) -> Tensor:
    """K `[pages, n_k, panels, d_k, 32]`, or bf16 `[pages, n_k, panels, d_k / 2, 32, 2]`, -> `[pages, n_k, s, d_k]`."""
    by_token = panels.transpose(3, 4)
    return (by_token.flatten(4) if panels.dim() == 6 else by_token).flatten(2, 3)


def rows_to_panels(k: Tensor) -> Tensor:
    """K `[pages, n_k, s, d_k]` -> panels; the slots behind s are zero."""
    padded = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % PANEL_TOKENS))
    by_token = padded.unflatten(2, (-1, PANEL_TOKENS))
    if k.dtype == torch.bfloat16:
        by_token = by_token.unflatten(4, (-1, 2))
    return by_token.transpose(3, 4).contiguous()


def gather_pages(pages: Tensor, block_table: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """`[blocks, heads, block_size, d]` -> `[b, heads, max_blocks * block_size, d]`.

    Only the blocks that hold a position in [start, end) are looked up; the others repeat page 0.
    """
    block_size = pages.shape[2]
    first = torch.arange(block_table.shape[1], device=pages.device) * block_size
    needed = (first < end[:, None]) & (first + block_size > start[:, None]) & (start < end)[:, None]
    table = torch.where(needed, block_table, 0)
    return pages.index_select(0, table.flatten()).unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)


def dense_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    cache_start: Tensor | None,
    block_table: Tensor | None,
    k_layout: str,
) -> tuple[Tensor, Tensor]:
    """K `[b, n_k, capacity, d_k]` and V `[b, n_v, capacity, d_v]` of any cache, zero where it holds no token."""
    start = torch.zeros_like(cache_seqlens) if cache_start is None else cache_start
    k = ungroup(k_cache) if k_layout == "rows" else panels_to_rows(k_cache)[:, :, : v_cache.shape[2]]
    v = ungroup(v_cache)
    if block_table is not None:
        k, v = (gather_pages(x, block_table, start, cache_seqlens) for x in (k, v))
    return keep_keys(k, start, cache_seqlens), keep_keys(v, start, cache_seqlens)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * x, for 32-bit numbers; a product of 64 bits would overflow int64."""
    low = a * (x & 0xFFFF)
    upper = a * (x >> 16) + (low >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words per counter; all words are held in int64."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """How many of the 65536 numbers of 16 bits mean that an element is dropped."""
    return min(65535, int(dropout_p * 65536 + 0.5))


def dropout_mask(
    b: int,
    n_q: int,
    s_q: int,
    s_k: int,
    dropout_p: float,
    seed: int,
    offset: int = 0,
    device: torch.device | None = None,
    *,
    first_entry: int = 0,
) -> Tensor:
    """Which softmax weights dropout keeps, bool `[b, n_q, s_q, s_k]`; those count 65536 / (65536 - dropped) times.

    A number of 16 bits decides on each element, whatever the shape of the call: the halves of the words of counter
    (key position // 8, query position, entry * n_q + q head, offset), low half first, under the two halves of seed.
    """
    eights = torch.arange(-(-s_k // 8), device=device)
    query = torch.arange(s_q, device=device)[:, None]
    head = (torch.arange(b * n_q, device=device) + first_entry * n_q)[:, None, None]
    words = philox((eights, query, head, torch.full_like(eights, offset)), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (numbers.flatten(2)[..., :s_k] >= dropout_threshold(dropout_p)).unflatten(0, (b, n_q))


# ---- attention -------------------------------------------------------------------------------------------------------


def keep_keys(x: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
    """`[b, heads, s, d]` with zeros outside [start, end): what may be NaN there must not meet a weight of 0."""
    if start is None and end is None:
        return x
    exists = visible_keys(1, x.shape[2], x.shape[2], start=start, end=end, device=x.device)
    return torch.where(exists.transpose(2, 3), x, 0)


def visible_keys(
    s_q: int,
    s_k: int,
    length: int | Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    start: Tensor | None = None,
    end: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which of s_k keys each query sees, bool `[b or 1, 1, s_q, s_k]`. Query i stands at position i + length - s_q."""

    def per_entry(x: int | Tensor) -> int | Tensor:
        return x[:, None, None, None] if isinstance(x, Tensor) else x

    key = torch.arange(s_k, device=device)
    query = torch.arange(s_q, device=device)[None, None, :, None] + per_entry(length) - s_q
    visible = torch.ones(1, 1, s_q, s_k, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (key <= query)
    # Distances are compared with windows as they are: a position and a window may have no sum.
    if window[0] >= 0:
        visible = visible & (query - key <= window[0])
    if window[1] >= 0:
        visible = visible & (key - query <= window[1])
    if start is not None:
        visible = visible & (key >= per_entry(start))
    if end is not None:
        visible = visible & (key < per_entry(end))
    return visible


def _compute_dtype(q: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """Dot products `[b, n_q, s_q, s_k]`."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)


def softmax(logits: Tensor, visible: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights `[b, n_q, s_q, s_k]` and lse `[b, n_q, s_q]`; a row that sees nothing has weights 0 and lse -inf.

    Differences are those from the maximum: the lse of large logits is rounded by more than exponents can bear.
    """
    nothing = logits.new_full((), float("-inf"))
    logits = torch.where(visible, logits, nothing)
    most = logits.detach().amax(-1) if logits.shape[-1] else nothing.expand(logits.shape[:-1])
    if sinks is not None:
        sinks = sinks.to(logits.dtype)[:, None]
        most = torch.maximum(most, sinks.detach())
    most = torch.where(most == nothing, 0, most)  # -inf - -inf would be NaN
    powers = torch.where(visible, (logits - most[..., None]).exp(), 0)
    total = powers.sum(-1)
    if sinks is not None:
        total = total + (sinks - most).exp()
    empty = total == 0
    total = torch.where(empty, 1, total)
    return powers / total[..., None], torch.where(empty, nothing, most + total.log())


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    first_entry: int = 0,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q `[b, n_q, s_q, d_k]`, k `[b, n_k, s_k, d_k]`, v `[b, n_v, s_k, d_v]` -> out `[b, n_q, s_q, d_v]`, lse.

    Query i sees key j where kv_start <= j < kv_end and, with p = i + s_k - s_q: j <= p if causal, and
    p - left <= j <= p + right for window = (left, right), -1 being unlimited. softcap c replaces a scaled score x by
    c * tanh(x / c). sinks `[n_q]` are logits of keys without a value; lse includes them. Dropout, of `dropout_mask` for
    the entries from first_entry on, acts on the softmax weights; lse is without it.
    """
    (b, n_q, s_q, _), s_k = q.shape, k.shape[2]
    visible = visible_keys(s_q, s_k, s_k, causal=causal, window=window, start=kv_start, end=kv_end, device=q.device)
    kept = None
    if dropout_p:
        kept = dropout_mask(b, n_q, s_q, s_k, dropout_p, seed, offset, q.device, first_entry=first_entry)
    q, k, v = (x.to(_compute_dtype(q, dtype)) for x in (q, k, v))
    k, v = keep_keys(k, kv_start, kv_end), keep_keys(v, kv_start, kv_end)
    out, lse = attend(q, k, v, visible, softmax_scale, softcap, sinks, dropout_p, kept)
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype of q, k and v; visible and kept: bool, broadcastable to `[b, n_q, s_q, s_k]`."""
    logits = dot_products(q, k) * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weights, lse = softmax(logits, visible, sinks)
    if kept is not None:
        weights = torch.where(kept, weights * (65536 / (65536 - dropout_threshold(dropout_p))), 0)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each entry of packed sequences: q `[total_q, n_q, d_k]` -> out `[total_q, n_q, d_v]`, lse.

    Entry e owns the rows cu_seqlens[e] to cu_seqlens[e + 1]; kv_start and kv_end count inside it. lse
    `[n_q, total_q]`.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    # The rows before the first entry: none, but they give the results their shapes if there is no entry.
    bounds = [(0, 0, 0, 0), *zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)]
    parts = []
    for entry, (from_q, to_q, from_k, to_k) in enumerate(bounds, start=-1):
        padding = {"kv_start": kv_start, "kv_end": kv_end} if entry >= 0 else {}
        parts.append(
            attention(
                *(x.transpose(0, 1)[None] for x in (q[from_q:to_q], k[from_k:to_k], v[from_k:to_k])),
                first_entry=entry,
                return_lse=True,
                **{name: x[entry : entry + 1] for name, x in padding.items() if x is not None},
                **options,
            )
        )
    out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
    lse = torch.cat([lse[0] for _, lse in parts], dim=1)
    return (out, lse) if return_lse else out


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
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last s_q of cache_seqlens tokens, causal among themselves, with all cached tokens."""
    k, v = dense_cache(k_cache, v_cache, cache_seqlens, cache_start, block_table, k_layout)
    visible = visible_keys(
        q.shape[2], k.shape[2], cache_seqlens, causal=True, window=window, start=cache_start, device=q.device
    )
    q, k, v = (x.to(_compute_dtype(q, dtype)) for x in (q, k, v))
    out, lse = attend(q, k, v, visible, softmax_scale, softcap, sinks)
    return (out, lse) if return_lse else out


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
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, SelectiveVStats]:
    """`decode_attention` that reads, for each query row, only the V rows of its top_k best scores (Table 3).

    Best: score descending (the dot product before scaling; ascending if the scale is negative), then index ascending.
    With m = softmax mass of the rows used, the rest adds nothing ("drop"), scales the sum by 1 / m ("renorm"), or
    counts with the mean of the V rows that the query sees ("mean"). A row that uses all it sees is dense attention.

    With max_error a row uses as many more of its best rows as bring its error bound to max_error or less, up to
    MAX_ADDED * top_k of them; if those are too few, it uses all.
    """
    k, v = dense_cache(k_cache, v_cache, cache_seqlens, cache_start, block_table, k_layout)
    (b, n_q, s_q, d_k), capacity = q.shape, k.shape[2]
    visible = visible_keys(s_q, capacity, cache_seqlens, causal=True, start=cache_start, device=q.device)
    visible = visible.expand(b, n_q, s_q, capacity)
    q, k, v = (x.to(_compute_dtype(q, dtype)) for x in (q, k, v))
    scale = d_k**-0.5 if softmax_scale is None else softmax_scale
    scores = dot_products(q, k)
    weights, lse = softmax(scores * scale, visible)

    # Visible keys from the best to the worst, then the others. Both sorts are stable: ties stay in index order.
    order = (-scores if scale < 0 else scores).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, (~visible.gather(-1, order)).byte().argsort(dim=-1, stable=True))
    best = torch.zeros_like(visible).scatter(-1, order[..., :top_k], True) & visible

    rank = visible.cumsum(-1)  # 1 for the first visible key of a row, `count` for the last
    count = visible.sum(-1, keepdim=True)
    forced = visible & ((rank <= keep_first) | (rank > count - keep_last))

    v_head = torch.arange(n_q, device=q.device) * v.shape[1] // n_q
    if v_stats is None:
        v_sum, v_norm = v.sum(2), v.norm(dim=-1).amax(-1) if capacity else v.new_zeros(b, v.shape[1])
    else:
        v_sum, v_norm = v_stats[..., :-1].to(v.dtype), v_stats[..., -1].to(v.dtype)
    written = visible_keys(s_q, capacity, cache_seqlens, start=cache_start, end=cache_seqlens, device=q.device)
    later = written & ~visible  # newer than the query
    v_mean = (v_sum[:, v_head, None] - later.to(v.dtype) @ v[:, v_head]) / count.clamp_min(1)  # [b, n_q, s_q, d_v]
    radius = v_norm[:, v_head, None].expand_as(lse)
    if tail == "mean":
        radius = radius + v_mean.norm(dim=-1)

    used = best | forced
    if max_error is not None and capacity:
        # After the best row, the two best, ...: the mass that is not read. |out| <= v_norm bounds "renorm".
        read = torch.where(forced, 0, weights).gather(-1, order).cumsum(-1) + (weights * forced).sum(-1, keepdim=True)
        bound = (1 - read) * radius[..., None] * (2 if tail == "renorm" else 1)
        enough = (~(bound > max_error) | (torch.arange(1, capacity + 1, device=q.device) >= count)).int().argmax(-1) + 1
        enough = torch.where(enough > MAX_ADDED * top_k, capacity, enough)[..., None]
        used = visible & (used | (order.argsort(dim=-1) < enough))
    rows_used, count = used.sum(-1), count[..., 0]

    kept = torch.where(used, weights, 0)
    kept_mass = kept.sum(-1)
    kept_mass = torch.where((rows_used == count) & ~kept_mass.isnan(), (count > 0).to(kept_mass.dtype), kept_mass)
    discarded = torch.where(count > 0, 1 - kept_mass, 0).clamp_min(0)

    out = kept @ v[:, v_head]
    if tail == "renorm":
        out = torch.where(count[..., None] > 0, out / kept_mass[..., None], out)
        radius = radius + out.norm(dim=-1)
    elif tail == "mean":
        out = out + discarded[..., None] * v_mean

    positions = torch.arange(capacity, device=q.device).expand_as(best)
    indices = torch.where(best, positions, capacity).sort(dim=-1).values[..., :top_k]
    indices = torch.nn.functional.pad(indices, (0, max(0, top_k - capacity)), value=capacity)
    indices = torch.where(indices == capacity, -1, indices)
    bound = torch.where(discarded > 0, discarded * radius, discarded)
    return out, SelectiveVStats(lse, kept_mass, indices, rows_used.int(), bound)


# ---- cache and feed-forward ------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """RoPE of the first d_rot dimensions of x `[b, heads, s, d]`; cos, sin `[b or 1, s, d_rot]`, half-split pairs."""
    d_rot = cos.shape[-1]
    x = x.to(_compute_dtype(x, dtype))
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    turned, rest = x[..., :d_rot], x[..., d_rot:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    block_table: Tensor | None = None,
    v_stats: Tensor | None = None,
    k_layout: str = "rows",
) -> None:
    """Writes token t of entry b, k `[b, n_k, s_new, d_k]` and v `[b, n_v, s_new, d_v]`, to slot positions[b, t].

    Position -1 skips the token. K is rotated first if cos and sin are given. v_stats `[b, n_v, d_v + 1]` keeps the sum
    of the V rows written and their largest L2 norm.
    """
    groups = gcd(k.shape[1], v.shape[1])
    page_size = v_cache.shape[2]
    if cos is not None and sin is not None:
        k = rotate(k, cos, sin).to(k_cache.dtype)
    for entry, row in enumerate(positions.tolist()):
        for token, position in enumerate(row):
            if position == -1:
                continue
            page = entry if block_table is None else int(block_table[entry, position // page_size])
            slot = position if block_table is None else position % page_size
            k_row, v_row = k[entry, :, token], v[entry, :, token]
            v_cache[page, :, slot] = v_row.unflatten(0, (groups, -1))
            if k_layout == "rows":
                k_cache[page, :, slot] = k_row.unflatten(0, (groups, -1))
            else:
                in_panel = k_cache[page, :, slot // PANEL_TOKENS, :, slot % PANEL_TOKENS]
                in_panel.copy_(k_row.reshape(in_panel.shape))
            if v_stats is not None:
                v_stats[entry, :, :-1] += v_row
                v_stats[entry, :, -1] = torch.maximum(v_stats[entry, :, -1], v_row.to(v_stats.dtype).norm(dim=-1))


def swiglu(gate: Tensor, up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gate) * up, the activation of augmented Q (appendix E)."""
    gate, up = (x.to(_compute_dtype(gate, dtype)) for x in (gate, up))
    return gate * torch.sigmoid(gate) * up


def packed_linear(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias for x `[..., k]` and W `[n, k]` in panels of 32 output features.

    weight is `[panels, k, 32]` (float32, float16), `[panels, k / 2, 32, 2]` (bfloat16, int8), or uint8 `[panels, k / 8,
    32, 4]`, whose 32-bit words hold eight integers plus 8. W is scale * integer + zero where there are scales
    `[panels, groups, 32]`.
    """
    x = x.to(_compute_dtype(x, dtype))
    if weight.dtype == torch.uint8:
        word = (weight.long() << torch.tensor([0, 8, 16, 24], device=weight.device)).sum(-1)
        # Input feature 2 j + h of the eight has bits 4 j of half h.
        weight = torch.stack([(word >> (16 * (i % 2) + 4 * (i // 2)) & 15) - 8 for i in range(8)], -1)
    by_feature = weight.unsqueeze(-1) if weight.dim() == 3 else weight
    w = by_feature.transpose(1, 2).flatten(2).to(x.dtype)  # [panels, 32, k]
    if scales is not None:
        groups = w.unflatten(2, (scales.shape[1], -1))
        groups = groups * scales.to(x.dtype).transpose(1, 2)[..., None]
        w = (groups if zeros is None else groups + zeros.to(x.dtype).transpose(1, 2)[..., None]).flatten(2)
    out = x @ w.flatten(0, 1)[:out_features].T
    return out if bias is None else out + bias.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x."""
    x = x.to(_compute_dtype(x, dtype))
    return weight.to(x.dtype) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`rotate` of x `[b, t, heads, d]`."""
    return rotate(x.transpose(1, 2), cos, sin, dtype).transpose(1, 2)
