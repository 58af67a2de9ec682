"""Memory that is read from end to end, token after token: caches and weights."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor that, if large and on the CPU, lies in huge pages where the system has them: reading it
    then misses the TLB less."""
    numel = prod(shape)
    size = numel * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    # The tensor keeps the map alive, which goes when the last view of it does.
    return torch.frombuffer(pages, dtype=dtype, count=numel, offset=-start % _HUGE_PAGE).view(*shape)


def contiguous(x: Tensor) -> Tensor:
    """A contiguous copy of x, in memory of `empty`."""
    return empty(x.shape, x.dtype, x.device).copy_(x)
