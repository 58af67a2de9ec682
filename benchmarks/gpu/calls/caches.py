"""Caches whose unused slots, pages and gaps are NaN, as decode_attention and selective_v_attention read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common.inputs import NAN, as_caches, in_pages, poison_absent, poison_unneeded

from .base import Call, Case, Source, TestedOp, drawn, evenly, rarely

_CAPACITIES = {True: (33, 64, 200, 500, 1100, 4096, 20000), False: (33, 64, 200, 300)}


@dataclass(frozen=True)
class CachedCase(Case):
    batch: int = 2
    s_q: int = evenly(1, 1, 1, 1, 2, 5, 16, 40)
    capacity: int = 200
    page: int = rarely(0, 16, 32, 64, 5)  # tokens; 0: not paged
    memory: str = evenly("heads first", "heads first", "tokens first")  # the first is that of diffqkv.Cache
    gap: int = rarely(0, 8, 3)  # elements of NaN after every row
    padded: bool = rarely(False, True)  # on the left
    full: bool = False  # every entry has `capacity` tokens
    scale: float | None = rarely(None, 0.2, -0.25)


class Cached(NamedTuple):
    """The arguments, and the same tokens as dense K and V, zero where there are none."""

    args: dict[str, Any]
    k: Tensor
    v: Tensor
    visible: Tensor  # [b, 1, s_q, capacity]


def drawn_cached(kind: type[CachedCase], dtypes: Sequence[torch.dtype], on_gpu: bool, count: int) -> list[CachedCase]:
    """Random cases, the same ones in every run."""
    random = Random(kind.__name__)
    cases = []
    for _ in range(count):
        capacity = random.choice(_CAPACITIES[on_gpu])
        batch = random.choice((1, 2, 5)) if capacity < 4096 else 1
        cases.append(drawn(kind, dtypes, random, capacity=capacity, batch=batch))
    return cases


def cached(case: CachedCase, source: Source, values: Callable[..., Tensor] | None = None) -> Cached:
    """values(*shape) draws Q and K; normal by default."""
    draw = values or partial(source.normal, dtype=case.dtype)
    (n_q, n_k, n_v), (d_k, d_v) = case.heads, case.dims
    b, capacity, device = case.batch, case.capacity, source.device
    lengths = source.integers(0, capacity, b)
    lengths[0] = capacity
    if case.full:
        lengths.fill_(capacity)
    start = (torch.rand(b, generator=source.generator) * 0.5 * lengths).int() if case.padded else None
    q, k = draw(b, n_q, case.s_q, d_k), draw(b, n_k, capacity, d_k)
    v = source.normal(b, n_v, capacity, d_v, dtype=case.dtype)
    k, v = (poison_absent(x, lengths, start) for x in (k, v))

    pages, table = (k, v), None
    if case.page:
        blocks = -(-capacity // case.page)
        pool = 2 * b * blocks
        table = source.permutation(pool)[: b * blocks].view(b, blocks).int()
        pages = tuple(in_pages(x, table, case.page, pool) for x in (k, v))
        table = poison_unneeded(table, case.page, lengths, start).to(device)
    k_cache, v_cache = (_placed(x, case) for x in as_caches(*pages))
    lengths = lengths.to(device)
    start = None if start is None else start.to(device)
    args = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths, "cache_start": start,
        "block_table": table, "softmax_scale": case.scale,
    }  # fmt: skip
    visible = reference.visible_keys(case.s_q, capacity, lengths, causal=True, start=start, device=device)
    return Cached(args, k.nan_to_num(0), v.nan_to_num(0), visible)


def _placed(rows: Tensor, case: CachedCase) -> Tensor:
    """A cache `[pages, groups, page, heads, dim]` in the case's order of memory, with gaps of NaN."""
    if case.memory == "heads first":
        rows = rows.transpose(2, 3)
    stored = rows.new_full((*rows.shape[:-1], rows.shape[-1] + case.gap), NAN)[..., : rows.shape[-1]].copy_(rows)
    return stored.transpose(2, 3) if case.memory == "heads first" else stored


class OnCache(TestedOp):
    by_entry = dict.fromkeys(("q", "cache_seqlens", "cache_start", "block_table", "out", "lse"), 0)
    any_strides = ("q", "k_cache", "v_cache")

    def alone(self, call: Call, entry: int):
        one, part = super().alone(call, entry)
        if call.args["block_table"] is None:
            for name in ("k_cache", "v_cache"):
                one.args[name] = one.args[name][entry : entry + 1]
        return one, part
