"""Inputs of kv_cache_update: shapes, layouts, poisoned caches, and what plain torch makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import torch

ROWS, PANELS = 0, 1
PANEL_TOKENS = 32
UNUSED_BLOCK = 2**31 - 1
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(BITS[x.dtype])


@dataclass(frozen=True)
class Case:
    """One call. Caches hold NaN before it; `gap` elements of NaN follow every row of a cache in the rows layout."""

    n_k: int
    n_v: int
    d_k: int
    d_v: int
    batch: int
    s_new: int
    dtype: torch.dtype = torch.bfloat16
    k_layout: int = ROWS
    paged: bool = False
    rope: str = "none"  # none, full (fp32), half (the first half of d_k, in dtype)
    index: torch.dtype = torch.int64
    stats: bool = True
    gap: int = 0
    bad_positions: bool = True  # some tokens skipped, out of range, or in blocks that do not exist
    capacity: int = 96

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        where = f"{'panels' if self.k_layout else 'rows'}{', paged' if self.paged else ''}, gap {self.gap}"
        shape = f"heads {self.n_k}/{self.n_v}, dims {self.d_k}/{self.d_v}, batch {self.batch}, s_new {self.s_new}"
        return f"{name}, {where}, {shape}, rope {self.rope}, stats {self.stats}, {self.index}"


@dataclass
class Call:
    """The tensors of a call. `k_storage` and `v_storage` include the gaps, and are what is compared."""

    k_storage: torch.Tensor
    v_storage: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    options: dict

    def run(self, op) -> None:
        op(self.k_cache, self.v_cache, self.k, self.v, self.positions, **self.options)

    def written(self) -> tuple[torch.Tensor, ...]:
        """Bits of everything the op may write."""
        stats = self.options["v_stats"]
        return bits(self.k_storage), bits(self.v_storage), *(() if stats is None else (bits(stats),))


def _cache(shape: tuple[int, ...], gap: int, dtype: torch.dtype, device: torch.device):
    storage = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype, device=device)
    return storage, storage[..., : shape[-1]]


def make_call(case: Case, seed: int, device: torch.device) -> Call:
    """Drawn on the CPU, so that every device gets the same numbers."""
    random = torch.Generator().manual_seed(seed)
    groups = gcd(case.n_k, case.n_v)
    page_size = PANEL_TOKENS if case.paged else case.capacity
    blocks = case.capacity // page_size
    pages = case.batch * blocks + 2 if case.paged else case.batch

    def heads(n: int, d: int) -> torch.Tensor:  # as a projection leaves them: [b, s, n, d] in memory
        return torch.randn(case.batch, case.s_new, n, d, generator=random).to(case.dtype).to(device).transpose(1, 2)

    order = torch.stack([torch.randperm(case.capacity, generator=random) for _ in range(case.batch)])
    positions = order[:, : case.s_new].to(case.index).contiguous()
    table = None
    if case.paged:
        table = torch.randperm(pages, generator=random)[: case.batch * blocks].view(case.batch, blocks).int()
        table = torch.cat([table, torch.full((case.batch, 2), UNUSED_BLOCK, dtype=torch.int32)], dim=1)
    if case.bad_positions:
        lowest = torch.iinfo(torch.int32).min
        for i, bad in enumerate((-1, case.capacity + 2 * page_size * case.paged, lowest, 2**31 - 1, -1)):
            positions.view(-1)[2 + 7 * i :: 41] = bad
        if table is not None:
            table[0, 0], table[-1, blocks - 1] = -1, pages
            positions[-1, -1] = case.capacity + 1  # in an unused block

    if case.k_layout == PANELS:
        pair = (case.d_k // 2, PANEL_TOKENS, 2) if case.dtype == torch.bfloat16 else (case.d_k, PANEL_TOKENS)
        k_storage, k_cache = _cache((pages, case.n_k, -(-page_size // PANEL_TOKENS), *pair), 0, case.dtype, device)
    else:
        k_shape = (pages, groups, page_size, case.n_k // groups, case.d_k)
        k_storage, k_cache = _cache(k_shape, case.gap, case.dtype, device)
    v_storage, v_cache = _cache((pages, groups, page_size, case.n_v // groups, case.d_v), case.gap, case.dtype, device)

    cos = sin = stats = None
    if case.rope != "none":
        d_rot, dtype = (case.d_k, torch.float32) if case.rope == "full" else (case.d_k // 2 // 2 * 2, case.dtype)
        angles = torch.rand(1 if case.s_new % 2 else case.batch, case.s_new, d_rot, generator=random) * 6.3
        cos, sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
    if case.stats:
        stats = torch.randn(case.batch, case.n_v, case.d_v + 1, generator=random)
        stats[..., -1].abs_()
        stats = stats.to(device)
    k, v = heads(case.n_k, case.d_k), heads(case.n_v, case.d_v)
    options = {"cos": cos, "sin": sin, "block_table": None if table is None else table.to(device)}
    options |= {"v_stats": stats, "k_layout": case.k_layout}
    return Call(k_storage, v_storage, k_cache, v_cache, k, v, positions.to(device), options)


def writable_positions(call: Call) -> torch.Tensor:
    """The positions, with -1 for every token that must not be written."""
    positions, table = call.positions.long(), call.options["block_table"]
    page_size, pages = call.v_cache.shape[2], call.v_cache.shape[0]
    capacity = page_size if table is None else page_size * table.shape[1]
    inside = (positions >= 0) & (positions < capacity)
    if table is not None:
        page = table.long().gather(1, positions.clamp(0, capacity - 1) // page_size)
        inside &= (page >= 0) & (page < pages)
    return torch.where(inside, positions, -1)


def expected(case: Case, seed: int, cache_update) -> Call:
    """The same call on the CPU, done by the reference."""
    call = make_call(case, seed, torch.device("cpu"))
    options = call.options | {"k_layout": "panels" if case.k_layout else "rows"}
    cache_update(call.k_cache, call.v_cache, call.k, call.v, writable_positions(call), **options)
    return call


def grid(bad_positions: bool) -> Iterator[Case]:
    """What correctness runs through: a few seconds of reference on the CPU."""
    shapes = (
        Case(4, 16, 64, 64, batch=3, s_new=1),
        Case(4, 16, 64, 64, batch=2, s_new=70),
        Case(4, 6, 40, 56, batch=2, s_new=33, index=torch.int32),
        Case(1, 8, 32, 64, batch=1, s_new=5, stats=False, gap=8),
        Case(8, 8, 8, 256, batch=2, s_new=9, gap=3),
        Case(5, 1, 256, 8, batch=1, s_new=64, index=torch.int32),
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for k_layout in (ROWS, PANELS):
            for paged in (False, True):
                for rope in ("none", "full", "half"):
                    for shape in shapes:
                        yield replace(
                            shape,
                            dtype=dtype,
                            k_layout=k_layout,
                            paged=paged,
                            rope=rope,
                            bad_positions=bad_positions,
                        )
