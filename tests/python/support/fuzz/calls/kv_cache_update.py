"""Calls of kv_cache_update."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, Draw, numbers
from ..oracle import PRECISION
from .base import Circumstances, check, close, same_bits
from .caches import Store


def _twin(x: Tensor) -> Tensor:
    """x and the memory around it, once more."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


def _memory(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def kv_cache_update(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    b = d.integer(0, 4)
    heads, dims = d.heads(24), (d.dim(), d.dim())
    ends = [d.length(150) for _ in range(b)]
    firsts = [d.integer(0, n) if d.chance(0.5) else 0 for n in ends]
    s = Store(d, ends, firsts, heads, dims, dtype)
    if d.chance(0.7):
        s.k.copy_(d.tensor(*s.k.shape, dtype=dtype))
        s.v.copy_(d.tensor(*s.v.shape, dtype=dtype))
    s_new = d.choice(1, 1, d.length(40))
    slots = []
    for first, end in zip(firsts, ends, strict=True):
        row = d.random.sample(range(first, end), min(s_new, end - first))
        row = [-1 if d.chance(0.15) else n for n in row] + [-1] * (s_new - len(row))
        if d.chance(0.5):
            row.sort()
        slots.append(row)
    positions = torch.tensor(slots, dtype=d.choice(torch.int32, torch.int64)).view(b, s_new)
    if d.chance(0.3):
        positions = positions.T.contiguous().T
    k, v = (d.laid_out(d.tensor(b, n, s_new, size, dtype=dtype)) for n, size in zip(heads[1:], dims, strict=True))
    rotation: dict[str, Tensor] = {}
    if d.chance(0.5):
        d_rot = 2 * d.integer(0, dims[0] // 2) if d.chance(0.5) else dims[0]
        rows, kind = d.choice(1, b), d.choice(torch.float32, dtype)
        angles = d.tensor(rows, s_new, d_rot // 2, size=10.0).double()
        both = torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 1, 2)
        if d.chance(0.2):
            both = d.tensor(*both.shape).double()
        both = d.laid_out(both.to(kind))
        rotation = {"cos": both[0], "sin": both[1]}
    stats = d.tensor(b, heads[2], dims[1] + 1).abs() if d.chance(0.4) else None
    d.note(dtype=dtype, k=list(k.shape), v=list(v.shape), k_cache=list(s.k.shape), layout=s.layout, paged=s.paged)
    d.note(positions=slots, rotation=[list(x.shape) for x in rotation.values()], v_stats=stats is not None)
    written = {"k_cache": s.k, "v_cache": s.v} | ({} if stats is None else {"v_stats": stats})
    before = {name: _twin(x) for name, x in written.items()}

    def call(into: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
        cut = {name: x if s.paged and name != "v_stats" else x[rows] for name, x in into.items()}
        turn = {name: x[rows] if len(x) == b else x for name, x in rotation.items()}
        result = diffqkv.kv_cache_update(
            k=k[rows], v=v[rows], positions=positions[rows], **cut, **turn, **s.options(rows)
        )
        check(result is None, "returns something")
        return {name: _memory(x) for name, x in into.items()}

    given = {name: _twin(x) for name, x in {"k": k, "v": v, "positions": positions, **rotation}.items()}
    actual = here.call(lambda: call(written))
    actual = {name: x.clone() for name, x in actual.items()}
    for name, x in {"k": k, "v": v, "positions": positions, **rotation}.items():
        same_bits(f"{name}, which is only read", _memory(x), _memory(given[name]))
    if stats is not None:
        _check_stats(stats, before["v_stats"], v, slots)
    p, wanted = PRECISION[dtype], {}
    for e, row in enumerate(slots):
        for t, position in enumerate(row):
            if position != -1:
                wanted[e, position] = (k[e, :, t], v[e, :, t], t)
    for (e, position), (k_new, v_new, t) in wanted.items():
        k_row, v_row = s.k_row(s.k, e, position), s.v_row(s.v, e, position)
        same_bits(f"v_cache at {e}, {position}", v_row.reshape(v_new.shape), v_new)
        if rotation:
            rows = [numbers(x[e % len(x), t]) for x in (rotation["cos"], rotation["sin"])]
            exact, size = oracle.rotated(numbers(k_new), *rows)
            error = 4 * p.sums * size + p.results * np.abs(exact) + p.least
            error[:, len(rows[0]) :] = 0
            close(f"k_cache at {e}, {position}", k_row.reshape(k_new.shape), exact, error)
        else:
            same_bits(f"k_cache at {e}, {position}", k_row.reshape(k_new.shape), k_new)
        k_row.copy_(s.k_row(before["k_cache"], e, position))
        v_row.copy_(s.v_row(before["v_cache"], e, position))
    for name in ("k_cache", "v_cache"):
        same_bits(f"{name} beside the tokens", _memory(written[name]), _memory(before[name]))
    here.check_threads(lambda: call({name: _twin(x) for name, x in before.items()}), actual)
    if b > 1 and here.kernels and d.chance(0.3):
        again = {name: _twin(x) for name, x in before.items()}
        for e in range(b):
            here.call(lambda rows=slice(e, e + 1): call(again, rows))
        for name, x in again.items():
            same_bits(f"{name} written entry by entry", _memory(x), actual[name])


def _check_stats(stats: Tensor, before: Tensor, v: Tensor, slots: list[list[int]]) -> None:
    exact, size = numbers(before).copy(), np.abs(numbers(before))
    for e, row in enumerate(slots):
        for t, position in enumerate(row):
            if position != -1:
                x = numbers(v[e, :, t])
                exact[e, :, :-1] += x
                size[e, :, :-1] += np.abs(x)
                exact[e, :, -1] = np.maximum(exact[e, :, -1], np.linalg.norm(x, axis=-1))
    size[..., -1] = exact[..., -1]
    close("v_stats", stats, exact, 2**-24 * (8 + max(v.shape[2], v.shape[3]) / 4) * size + 1e-34)
