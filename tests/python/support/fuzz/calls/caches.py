"""Caches for calls, filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..draw import DTYPES, NAN, UNMAPPED, Draw, int32, numbers
from ..oracle import Entry, seen
from .base import Circumstances, same_bits


class Store:
    """A cache's memory. Where a token lies is told by `place`; everything that holds no token is NaN."""

    def __init__(
        self, d: Draw, tokens: list[int], starts: list[int], heads: tuple[int, int, int], dims, dtype, room: int = 0
    ):
        _, self.n_k, self.n_v = heads
        self.d_k, self.d_v = dims
        self.dtype, self.groups = dtype, math.gcd(self.n_k, self.n_v)
        self.layout = d.choice("rows", "panels")
        self.paged = d.chance(0.5)
        b, longest = len(tokens), max(tokens, default=0) + room
        self.table: list[list[int]] | None = None
        if self.paged:
            self.page_size = d.choice(32, 64, 96) if self.layout == "panels" else d.choice(1, 7, 16, 32, 33, 64)
            self.columns = columns = -(-longest // self.page_size) + d.choice(0, 0, 1, 3)
            pages = b * columns + d.integer(1, 5)
            self.table = [[d.random.choice(UNMAPPED) for _ in range(columns)] for _ in range(b)]
            free = list(range(pages))
            d.random.shuffle(free)
            for e, row in enumerate(self.table):
                for column in range(columns):
                    first = column * self.page_size
                    if first < tokens[e] + room and first + self.page_size > starts[e]:
                        row[column] = free.pop()
            self.capacity = columns * self.page_size
        else:
            pages, self.page_size = b, longest + d.choice(0, 0, 1, 32)
            self.capacity = self.page_size
        k_shape = self.k_shape(pages)
        inner = 1 if self.layout == "rows" else len(k_shape) - 3
        self.k = d.laid_out(torch.full(k_shape, NAN, dtype=dtype), inner)
        self.v = d.laid_out(
            torch.full((pages, self.groups, self.page_size, self.n_v // self.groups, self.d_v), NAN, dtype=dtype)
        )

    def k_shape(self, pages: int) -> tuple[int, ...]:
        if self.layout == "rows":
            return pages, self.groups, self.page_size, self.n_k // self.groups, self.d_k
        panels = -(-self.page_size // 32)
        if self.dtype == torch.bfloat16:
            return pages, self.n_k, panels, self.d_k // 2, 32, 2
        return pages, self.n_k, panels, self.d_k, 32

    def place(self, entry: int, position: int) -> tuple[int, int]:
        """Page and slot."""
        if self.table is None:
            return entry, position
        return self.table[entry][position // self.page_size], position % self.page_size

    def k_row(self, k: Tensor, entry: int, position: int) -> Tensor:
        """The view of `[n_k, d_k]` numbers, in other shapes."""
        page, slot = self.place(entry, position)
        if self.layout == "rows":
            return k[page, :, slot]
        return k[page, :, slot // 32, :, slot % 32]

    def v_row(self, v: Tensor, entry: int, position: int) -> Tensor:
        page, slot = self.place(entry, position)
        return v[page, :, slot]

    def write(self, entry: int, position: int, k: Tensor, v: Tensor) -> None:
        for row, x in ((self.k_row(self.k, entry, position), k), (self.v_row(self.v, entry, position), v)):
            row.copy_(x.reshape(row.shape))

    def options(self, rows: slice = slice(None)) -> dict[str, Any]:
        table = (
            None
            if self.table is None
            else torch.tensor(self.table, dtype=torch.int32).view(len(self.table), self.columns)[rows]
        )
        return {"block_table": table, "k_layout": self.layout}


class Filled:
    """Arguments that decode_attention and selective_v_attention share, and the entries for the oracle."""

    def __init__(self, d: Draw, exact: bool = False, window: bool = True):
        self.dtype = d.choice(*DTYPES)
        long = d.chance(0.15)
        b = 1 if long else d.integer(0, 3) if d.chance(0.1) else d.integer(1, 3)
        self.s_q = d.choice(1, 1, 1, 2, d.integer(0, 20))
        heads = d.heads(4 if long else max(1, min(16, 500 // max(1, b * self.s_q))))
        self.n_q, self.n_k, self.n_v = heads
        self.d_k, self.d_v = d.dim(), d.dim()
        self.lengths = [d.integer(300, 1600) if long else d.length() for _ in range(b)]
        starts = [0] * b
        self.start: Tensor | None = None
        if d.chance(0.4):
            starts = [d.integer(0, n + 3) if d.chance(0.5) else d.integer(0, max(0, n - 1)) for n in self.lengths]
            self.start = int32(starts)
        self.store = s = Store(d, self.lengths, starts, heads, (self.d_k, self.d_v), self.dtype)
        most = max(self.lengths, default=0)
        q, k, self.exact = d.q_and_k((b, self.n_q, self.s_q, self.d_k), (b, self.n_k, most, self.d_k), self.dtype)
        if exact and not self.exact:
            q, k, self.exact = q.round().clamp(-2, 2), k.round().clamp(-2, 2), True
        v = d.v(b, self.n_v, most, self.d_v, dtype=self.dtype)
        self.starts, self.k, self.v = starts, numbers(k), numbers(v)
        for e, n in enumerate(self.lengths):
            for t in range(starts[e], n):
                s.write(e, t, k[e, :, t], v[e, :, t])
        d.note(dtype=self.dtype, q=list(q.shape), k=list(s.k.shape), v=list(s.v.shape), layout=s.layout, paged=s.paged)
        d.note(cache_seqlens=self.lengths, cache_start=starts)
        self.q, self.window = d.laid_out(q), d.window() if window else (-1, -1)

    def tensors(self, rows: slice = slice(None)) -> dict[str, Any]:
        cut = slice(None) if self.store.paged else rows
        start = None if self.start is None else self.start[rows]
        lengths = int32(self.lengths)[rows]
        caches = {"k_cache": self.store.k[cut], "v_cache": self.store.v[cut]}
        return {"q": self.q[rows], **caches, "cache_seqlens": lengths, "cache_start": start, **self.store.options(rows)}

    def keys(self, e: int, query: int) -> list[int]:
        n = self.lengths[e]
        return seen(query + n - self.s_q, n, causal=True, window=self.window, start=self.starts[e])

    def entries(self) -> list[Entry]:
        def entry(e: int) -> Entry:
            n = self.lengths[e]
            return Entry(numbers(self.q[e]), self.k[e, :, :n], self.v[e, :, :n], lambda query: self.keys(e, query))

        return [entry(e) for e in range(len(self.lengths))]


def check_alone(d: Draw, here: Circumstances, call: Callable, results: dict[str, Tensor], b: int) -> None:
    if here.kernels and b > 1 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: call(slice(e, e + 1))).items():
            same_bits(f"{name} of entry {e} alone", x[0], results[name][e])
