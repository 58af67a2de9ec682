"""What the ops on a cache share: its layouts, and the checks of its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import PANEL_TOKENS
from . import checks
from .checks import Sizes, wrong

ROWS, PANELS = 0, 1


class CacheSizes(NamedTuple):
    """Head counts, dimensions and size of a cache."""

    n_k: int
    n_v: int
    d_k: int
    d_v: int
    pages: int
    page_size: int
    capacity: int  # tokens that an entry can hold


def check_blocks(block_table: Tensor, needed: Tensor, pages: int) -> None:
    """needed: bool `[b, max_blocks]`, the entries that will be looked up."""
    checks.values("block_table", block_table[needed], 0, pages - 1, f"0 to {pages - 1}, a block of the pool")


def check_blocks_of_tokens(block_table: Tensor, page_size: int, start: Tensor | None, end: Tensor, pages: int) -> None:
    """Checks the blocks that hold a token of [start, end) of each entry."""
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    needed = first < end[:, None]
    if start is not None:
        needed = needed & (first + page_size > start[:, None]) & (start < end)[:, None]
    check_blocks(block_table, needed, pages)


def check_cache(like: Tensor, batch: int, k_cache: Tensor, v_cache: Tensor, table: Tensor | None, k_layout: int):
    if k_layout not in (ROWS, PANELS):
        raise wrong("k_layout", k_layout, "0 (rows) or 1 (panels)")
    sizes = Sizes(b=batch)
    first = "b" if table is None else "blocks"
    checks.rows("v_cache", v_cache, like, sizes, f"{first} G s n_v/G d_v")
    page_size, groups = sizes["s"], sizes["G"]
    if k_layout == ROWS:
        checks.rows("k_cache", k_cache, like, sizes, f"{first} G s n_k/G d_k")
        n_k, d_k = groups * sizes["n_k/G"], sizes["d_k"]
    else:
        pairs = like.dtype == torch.bfloat16
        sizes["ceil(s/32)"] = -(-page_size // PANEL_TOKENS)
        checks.rows("k_cache", k_cache, like, sizes, f"{first} n_k ceil(s/32) {'d_k/2 32 2' if pairs else 'd_k 32'}")
        n_k, d_k = sizes["n_k"], 2 * sizes["d_k/2"] if pairs else sizes["d_k"]
        strides = (2 * PANEL_TOKENS, 2, 1) if pairs else (PANEL_TOKENS, 1)
        if k_cache.numel() and k_cache.stride()[3:] != strides:
            raise wrong("k_cache", f"strides {list(k_cache.stride())}", f"{list(strides)} inside a panel")
    n_v, d_v = groups * sizes["n_v/G"], sizes["d_v"]
    checks.head_dim("k_cache", d_k)
    checks.head_dim("v_cache", d_v)
    for name, n in (("k_cache", n_k), ("v_cache", n_v)):
        if n < 1:
            raise wrong(name, f"{n} heads", "at least 1")
    if groups != checks.gcd(n_k, n_v):
        want = f"gcd(n_k, n_v) = {checks.gcd(n_k, n_v)} groups"
        raise wrong("v_cache", f"{groups} groups for {n_k} K and {n_v} V heads", want)
    capacity = page_size
    if table is not None:
        checks.tensor("block_table", table, like, (torch.int32,), sizes, "b max_blocks")
        checks.unit_last_stride("block_table", table)
        multiple = PANEL_TOKENS if k_layout == PANELS else 1
        if page_size < 1 or page_size % multiple != 0:
            raise wrong("v_cache", f"block size {page_size}", f"a multiple of {multiple}")
        capacity = sizes["max_blocks"] * page_size
    return CacheSizes(n_k, n_v, d_k, d_v, sizes[first], page_size, capacity)


def check_v_stats(v_stats: Tensor | None, like: Tensor, batch: int, cache: CacheSizes) -> None:
    if v_stats is None:
        return
    sizes = Sizes({"b": batch, "n_v": cache.n_v, "d_v+1": cache.d_v + 1})
    checks.tensor("v_stats", v_stats, like, (torch.float32,), sizes, "b n_v d_v+1")
    checks.contiguous("v_stats", v_stats)
