"""Inputs of ops: head counts, orders of memory, and caches with poison in every unused place.

What a kernel must not read is NaN, or a block number that leads far outside: reading it shows in the result.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from diffqkv import reference

N_Q, N_K, N_V, D = 32, 4, 16, 64  # a layer of Sigma-1.5B
HEADS = [(32, 4, 16), (32, 16, 4), (12, 4, 6), (12, 6, 4), (8, 8, 8), (8, 1, 1), (8, 1, 8), (5, 1, 5)]
NAN = float("nan")
UNUSED_BLOCK = 2**31 - 1


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def strided(x: Tensor, how: str) -> Tensor:
    """x `[..., heads, tokens, dim]` in memory that is dense, has tokens first or gaps, or begins at an offset."""
    if how == "dense":
        return x.contiguous()
    if how == "tokens first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if how == "offset":
        return x.new_full((x.numel() + 13,), NAN)[13:].view(x.shape).copy_(x)
    assert how == "gaps", how
    view = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 8), NAN)[..., ::2, : x.shape[-1]]
    return view.copy_(x)


def poison_absent(x: Tensor, lengths: Tensor, start: Tensor | None) -> Tensor:
    """x `[b, heads, tokens, dim]` with NaN outside of each entry's tokens [start, length)."""
    slot = torch.arange(x.shape[2], device=lengths.device)
    absent = slot >= lengths[:, None]
    if start is not None:
        absent |= slot < start[:, None]
    return x.masked_fill(absent[:, None, :, None].to(x.device), NAN)


def in_pages(x: Tensor, table: Tensor, page: int, pool: int) -> Tensor:
    """x `[b, heads, tokens, dim]` as pages `[pool, heads, page, dim]`. Those that are not in the table are NaN."""
    blocks = table.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * page - x.shape[2]), value=NAN)
    pages = x.new_full((pool, x.shape[1], page, x.shape[3]), NAN)
    pages[table.long().to(x.device)] = padded.unflatten(2, (blocks, page)).transpose(1, 2)
    return pages


def poison_unneeded(table: Tensor, page: int, lengths: Tensor, start: Tensor | None) -> Tensor:
    """The block table with UNUSED_BLOCK for every page that holds none of the tokens [start, length)."""
    begin = torch.arange(table.shape[1]) * page
    unneeded = begin >= lengths[:, None]
    if start is not None:
        unneeded |= (begin + page <= start[:, None]) | (start >= lengths)[:, None]
    return torch.where(unneeded, UNUSED_BLOCK, table).int()


def as_caches(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v `[b, heads, tokens, dim]` in the rows layout of a cache."""
    groups = gcd(k.shape[1], v.shape[1])
    return reference.group(k, groups), reference.group(v, groups)
