"""New rows of K and V for a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import LAYOUTS, PANEL_TOKENS
from . import checks, dispatch
from .arguments import as_choice, refuse_gradients
from .caches import PANELS, ROWS, CacheSizes, check_blocks, check_cache, check_v_stats
from .calls import write
from .checks import DTYPES, Sizes, any_tensor, wrong
from .op import Op
from .rotary_embedding import check_rope


class KvCacheUpdateOptions(NamedTuple):
    """The options of `kv_cache_update`."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    block_table: Tensor | None = None
    v_stats: Tensor | None = None
    k_layout: int = ROWS


def _check_rope(k: Tensor, sizes: Sizes, cos: Tensor | None, sin: Tensor | None) -> None:
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise wrong(missing, None, f"a tensor, as {given} is given")
    if cos is not None:
        check_rope(k, cos, sin, sizes["b"], sizes["s_new"], sizes["d_k"])


def _check(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, options: KvCacheUpdateOptions
) -> CacheSizes:
    checks.kind("k_cache", k_cache, k_cache, DTYPES)
    checks.rows("k", k, k_cache, Sizes(), "b n_k s_new d_k")
    batch, table = k.shape[0], options.block_table
    cache = check_cache(k_cache, batch, k_cache, v_cache, table, options.k_layout)
    sizes = Sizes(b=batch, n_k=cache.n_k, d_k=cache.d_k, n_v=cache.n_v, d_v=cache.d_v)
    sizes.check("k", k, "b n_k s_new d_k")
    checks.rows("v", v, k_cache, sizes, "b n_v s_new d_v")
    checks.tensor("positions", positions, k, (torch.int32, torch.int64), sizes, "b s_new")
    _check_rope(k, sizes, options.cos, options.sin)
    check_v_stats(options.v_stats, k, batch, cache)
    checks.memory({"k_cache": k_cache, "v_cache": v_cache, "v_stats": options.v_stats}, {"k": k, "v": v})
    checks.values("positions", positions, -1, cache.capacity - 1, f"-1 (skip) or 0 to {cache.capacity - 1}")
    if table is not None and checks.readable(table):
        needed = torch.zeros_like(table, dtype=torch.bool)
        entry, token = (positions >= 0).nonzero(as_tuple=True)
        needed[entry, positions[entry, token].long() // cache.page_size] = True
        check_blocks(table, needed, cache.pages)
    return cache


def _composed(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    options: KvCacheUpdateOptions,
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
        panel, token = slot // PANEL_TOKENS, slot % PANEL_TOKENS
        at_k = (page, slice(None), panel, slice(None), token)
    for x_cache, at, x in ((k_cache, at_k, k), (v_cache, (page, slice(None), slot), v)):
        now = x_cache[at]  # [tokens, G, heads / G, d]; K panels: [tokens, n_k, d] or [tokens, n_k, d / 2, 2]
        new = x.transpose(1, 2).flatten(0, 1)[source].reshape(now.shape)
        x_cache[at] = torch.where(written.any(), new, now)
    if v_stats is not None:
        rows = torch.where(written.view_as(positions)[:, None, :, None], v.float(), 0)
        v_stats[..., :-1] += rows.sum(2)
        v_stats[..., -1] = torch.maximum(v_stats[..., -1], rows.norm(dim=-1).amax(2))


def _fake(*rest) -> None:
    return None


_OP = dispatch.register(Op("kv_cache_update", check=_check, fake=_fake, composed=_composed, panels_on_cuda=True))


def kv_cache_update(
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
    """Writes new K and V rows into a cache, in place, rotating K on the way (eq. 10, RoPE).

    Args:
        k_cache, v_cache, block_table, k_layout: as in `decode_attention`; the caches are written, and share no memory
            with each other, k or v.
        k: `[b, n_k, s_new, d_k]`.
        v: `[b, n_v, s_new, d_v]`.
        positions: int32 or int64 `[b, s_new]`: the slot of each token; -1 skips it. No two tokens of a call may have
            the same slot.
        cos, sin: `[b or 1, s_new, d_rot]`, float32 or k's dtype, d_rot even and at most d_k: rotate the first d_rot
            dimensions of k, in float32, dimension c with c + d_rot / 2 (the half-split convention).
        v_stats: float32 `[b, n_v, d_v + 1]`, written: the sum of the V rows, and last their largest L2 norm. Only the
            rows that this call writes are added; a slot that is written again counts twice.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode. On the CPU this includes a
            position outside the cache and an unmapped block; on CUDA such a token is not written, unless
            DIFFQKV_DEBUG=1 asks for the check, which synchronises.
        NotImplementedError: forward-mode differentiation.
    """
    layout = as_choice("k_layout", k_layout, LAYOUTS)
    any_tensor("k_cache", k_cache)
    run = dispatch.uses_kernel(_OP, k_cache, k_layout=layout)
    refuse_gradients("kv_cache_update", k_cache=k_cache, v_cache=v_cache, k=k, v=v, cos=cos, sin=sin)
    options = {"cos": cos, "sin": sin, "block_table": block_table, "v_stats": v_stats, "k_layout": layout}
    if run:
        write(_OP.kernel, (k_cache, v_cache, v_stats), k_cache, v_cache, k, v, positions, **options)
    else:
        _OP.composed(k_cache, v_cache, k, v, positions, **options)
