"""kv_cache_update: caches of NaN, skipped and impossible positions, gaps that must stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import bits
from diffqkv.benchmarks.common.inputs import NAN, UNUSED_BLOCK

from .base import Call, Case, Source, TestedOp

PANEL_TOKENS = reference.PANEL_TOKENS


@dataclass(frozen=True)
class UpdateCase(Case):
    """`gap` elements of NaN follow every row of a cache in the rows layout."""

    batch: int = 2
    s_new: int = 1
    k_layout: str = "rows"
    paged: bool = False
    rope: str = ""  # "", full (fp32), half (the first half of d_k, in dtype)
    index: torch.dtype = torch.int64
    stats: bool = True
    gap: int = 0
    bad_positions: bool = False  # some tokens skipped, out of range, or in blocks that do not exist
    capacity: int = 96


class KvCacheUpdate(TestedOp):
    op = "kv_cache_update"
    by_entry = dict.fromkeys(("k", "v", "positions", "block_table", "v_stats"), 0)
    any_strides = ("k_cache", "v_cache", "k", "v")

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[UpdateCase]:
        shapes = (
            UpdateCase(batch=3),
            UpdateCase(s_new=70),
            UpdateCase(heads=(12, 4, 6), dims=(40, 56), s_new=33, index=torch.int32),
            UpdateCase(heads=(8, 1, 8), dims=(32, 64), batch=1, s_new=5, stats=False, gap=8),
            UpdateCase(heads=(8, 8, 8), dims=(8, 256), s_new=9, gap=3),
            UpdateCase(heads=(5, 5, 1), dims=(256, 8), batch=1, s_new=64, index=torch.int32),
            UpdateCase(s_new=0),
        )
        every = [
            # On the CPU a bad position raises.
            replace(
                shape, dtype=dtype, k_layout=layout, paged=paged, rope=rope, bad_positions=on_gpu and shape.s_new > 0
            )
            for dtype in dtypes
            for layout in ("rows", "panels")
            for paged in (False, True)
            for rope in ("", "full", "half")
            for shape in shapes
        ]
        return every if on_gpu else every[::5]  # no divisor of the inner loops: every value is met

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[UpdateCase]:
        plain = UpdateCase(dtypes[0], batch=3, s_new=70, rope="full", bad_positions=on_gpu)
        return [plain, replace(plain, dtype=dtypes[1], dims=(64, 256), k_layout="panels", paged=True)]

    def make(self, case: UpdateCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)
        (_, n_k, n_v), (d_k, d_v), b, capacity = case.heads, case.dims, case.batch, case.capacity
        groups = gcd(n_k, n_v)
        page_size = PANEL_TOKENS if case.paged else capacity
        blocks = capacity // page_size
        pages = b * blocks + 2 if case.paged else b

        order = torch.stack([source.permutation(capacity) for _ in range(b)])
        positions = order[:, : case.s_new].to(case.index).contiguous()
        table = None
        if case.paged:
            table = source.permutation(pages)[: b * blocks].view(b, blocks).int()
            table = torch.cat([table, torch.full((b, 2), UNUSED_BLOCK, dtype=torch.int32)], dim=1)
        if case.bad_positions:
            lowest = torch.iinfo(torch.int32).min
            for i, bad in enumerate((-1, capacity + 2 * page_size * case.paged, lowest, 2**31 - 1, -1)):
                positions.view(-1)[2 + 7 * i :: 41] = bad
            if table is not None:
                table[0, 0], table[-1, blocks - 1] = -1, pages
                positions[-1, -1] = capacity + 1  # in an unused block

        def empty(*shape: int, gap: int = 0) -> tuple[Tensor, Tensor]:
            storage = torch.full((*shape[:-1], shape[-1] + gap), NAN, dtype=case.dtype, device=device)
            return storage, storage[..., : shape[-1]]

        if case.k_layout == "panels":
            pair = (d_k // 2, PANEL_TOKENS, 2) if case.dtype == torch.bfloat16 else (d_k, PANEL_TOKENS)
            k_storage, k_cache = empty(pages, n_k, -(-page_size // PANEL_TOKENS), *pair)
        else:
            k_storage, k_cache = empty(pages, groups, page_size, n_k // groups, d_k, gap=case.gap)
        v_storage, v_cache = empty(pages, groups, page_size, n_v // groups, d_v, gap=case.gap)

        cos = sin = stats = None
        if case.rope:
            d_rot, dtype = (d_k, torch.float32) if case.rope == "full" else (d_k // 2 // 2 * 2, case.dtype)
            shape = (1 if case.s_new % 2 else b, case.s_new, d_rot)
            angles = torch.rand(shape, generator=source.generator) * 6.3
            cos, sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
        if case.stats:
            stats = source.normal(b, n_v, d_v + 1)
            stats[..., -1].abs_()
        # As a projection leaves them: [b, s, n, d] in memory.
        k = source.normal(b, case.s_new, n_k, d_k, dtype=case.dtype).transpose(1, 2)
        v = source.normal(b, case.s_new, n_v, d_v, dtype=case.dtype).transpose(1, 2)
        args = {
            "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "positions": positions.to(device), "cos": cos,
            "sin": sin, "block_table": None if table is None else table.to(device), "v_stats": stats,
            "k_layout": int(case.k_layout == "panels"),
        }  # fmt: skip
        written = {"k_cache": k_storage, "v_cache": v_storage} | ({} if stats is None else {"v_stats": stats})
        before = {name: x.cpu().clone() for name, x in written.items()}

        def verify(results: dict[str, Tensor]) -> list[str]:
            return _wrong_writes(case, args, before, results)

        return Call(self.op, case, args, (), verify, written)

    def alone(self, call: Call, entry: int):
        """Caches and statistics are as they were before the call. A pool of pages stays whole, and is not compared."""
        one, _ = super().alone(call, entry)
        pools = () if call.args["block_table"] is None else ("k_cache", "v_cache")

        def part(storages: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x[entry : entry + 1] for name, x in storages.items() if name not in pools}

        written = {name: x.clone() for name, x in (call.before | part(call.before)).items()}
        args = one.args | {name: x[..., : one.args[name].shape[-1]] for name, x in written.items()}
        for name in ("cos", "sin"):
            if args[name] is not None and len(args[name]) > 1:
                args[name] = args[name][entry : entry + 1]
        return replace(one, args=args, written=written), part


def writable_positions(args: dict) -> Tensor:
    """The positions, with -1 for every token that must not be written."""
    positions, table = args["positions"].long(), args["block_table"]
    page_size, pages = args["v_cache"].shape[2], args["v_cache"].shape[0]
    capacity = page_size if table is None else page_size * table.shape[1]
    inside = (positions >= 0) & (positions < capacity)
    if table is not None:
        page = table.long().gather(1, positions.clamp(0, capacity - 1) // page_size)
        inside &= (page >= 0) & (page < pages)
    return torch.where(inside, positions, -1)


def _wrong_writes(case: UpdateCase, args: dict, before: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """The reference does the same on the CPU. Rotated K may differ by a rounding, sums by theirs; nothing else may."""
    want = {name: x.clone() for name, x in before.items()}
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    on_cpu |= {name: x[..., : args[name].shape[-1]] for name, x in want.items()}
    on_cpu |= {"positions": writable_positions(on_cpu), "k_layout": case.k_layout}
    reference.cache_update(**on_cpu)
    got = {name: x.cpu() for name, x in got.items()}

    wrong = []
    different = bits(got["k_cache"]) != bits(want["k_cache"])
    if case.rope:
        # The two products of a rotation may cancel: what counts as rounding is relative to them, up to about 2 max |k|.
        k = want["k_cache"].float()
        largest = on_cpu["k"].float().abs().max() if on_cpu["k"].numel() else 0.0
        bound = torch.finfo(case.dtype).eps * k.abs() + 2**-22 * 2 * largest
        different &= ~((got["k_cache"].float() - k).abs() <= bound)
    for name, bad in (("k_cache", different), ("v_cache", bits(got["v_cache"]) != bits(want["v_cache"]))):
        if bad.any():
            wrong.append(f"{name}: {int(bad.sum())} of {bad.numel()} elements wrong")
    if case.stats:
        error = (got["v_stats"] - want["v_stats"]).abs()
        if not bool((error <= 1e-5 * (1 + want["v_stats"].abs()) * max(1, case.s_new) ** 0.5).all()):
            wrong.append(f"v_stats: error up to {float(error.max()):.3g}")
    return wrong
