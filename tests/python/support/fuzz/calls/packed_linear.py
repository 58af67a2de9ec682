"""Calls of packed_linear."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, NAN, Draw, numbers
from ..oracle import PRECISION, Weights
from .base import Circumstances, check, close, precision_of, same_bits


def _panels(x: Tensor, other: float) -> Tensor:
    """x `[n, columns]` in panels `[ceil(n / 32), columns, 32]`, `other` in the places that n leaves over."""
    n, columns = x.shape
    out = x.new_full((-(-n // 32), columns, 32), other)
    for i in range(n):
        out[i // 32, :, i % 32] = x[i]
    return out


def _pairs(x: Tensor, other: float) -> Tensor:
    """Panels in which two neighbouring columns lie together."""
    even, odd = (_panels(x[:, first::2], other) for first in (0, 1))
    return torch.stack([even, odd], -1)


def _words(x: Tensor) -> Tensor:
    """Panels of integers from -8 to 7: the bits of eight columns are four bytes."""
    word = sum(_panels((x[:, i::8].long() + 8) << (16 * (i % 2) + 4 * (i // 2)), 0) for i in range(8))
    return torch.stack([word >> (8 * i) & 255 for i in range(4)], -1).to(torch.uint8)


def _drawn_x(d: Draw, rows: tuple[int, ...], k: int, dtype: torch.dtype) -> Tensor:
    x = d.tensor(*rows, k).double() * d.choice(0.01, 1, 1, 1, 100)
    style = d.choice("normal", "normal", "normal", "outlier", "zeros", "sizes", "special")
    d.note(numbers=style)
    if style == "outlier" and x.numel():
        x[..., d.integer(0, k - 1)] *= 10.0 ** d.integer(0, 3)
    elif style == "zeros":
        x[..., : d.integer(0, k)] = 0
    elif style == "sizes":  # of rows, and of neighbouring numbers within them
        largest = math.log10(PRECISION[dtype].largest) - 1
        low, high = (-45, largest) if dtype != torch.float16 else (-7, largest)
        sizes = d.tensor(*rows, -(-k // 32)).double() / 2
        x = x.sign() * 10.0 ** (low + (high - low) * torch.special.ndtr(sizes)).repeat_interleave(32, -1)[..., :k]
    elif style == "special":
        special = d.tensor(*rows, k) > d.choice(2, 3)
        x = torch.where(special, torch.tensor(d.choice(NAN, math.inf, -math.inf), dtype=x.dtype), x)
    return x.to(dtype)


def packed_linear(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    form = d.choice(dtype, torch.int8, torch.uint8)
    n, rows = (
        d.integer(1, 100),
        tuple(d.length(40) if d.chance(0.4) else d.integer(1, 5) for _ in range(d.integer(0, 2))),
    )
    step, group = (2 if form == torch.bfloat16 else 1), 32 * d.choice(1, 1, 2, d.integer(1, 8))
    k = group * d.integer(1, 4) if form != dtype else step * d.choice(d.integer(1, 40), d.integer(1, 300))
    d.note(dtype=dtype, weights=form, rows=list(rows), k=k, n=n)
    x = _drawn_x(d, rows, k, dtype)
    bias = d.tensor(n, dtype=dtype) if d.chance(0.5) else None
    options: dict[str, Any] = {"bias": bias}
    if form == dtype:
        w = d.tensor(n, k, size=d.choice(0.01, 1, 1, 30), dtype=dtype)
        weight = (_pairs if step == 2 else _panels)(w, NAN)
        weights = Weights(numbers(w))
    else:
        half = 128 if form == torch.int8 else 8
        integers = (d.tensor(n, k) * half / d.choice(1, 3)).round().clamp(-half, half - 1).to(torch.int8)
        if d.chance(0.1):
            integers[:] = -half
        weight = _pairs(integers, 77) if form == torch.int8 else _words(integers)
        kind = d.choice(*DTYPES)
        factors = d.tensor(n, k // group, size=d.choice(0.01, 1) / half, dtype=kind)
        zeros = d.tensor(n, k // group, size=d.choice(0.01, 1), dtype=kind) if d.chance(0.5) else None
        options |= {"scales": _panels(factors, NAN), "zeros": None if zeros is None else _panels(zeros, NAN)}
        weights = Weights(numbers(integers), numbers(factors), None if zeros is None else numbers(zeros))
        d.note(group=group, scales=kind, zeros=zeros is not None)

    given = d.laid_out(x) if x.dim() > 1 and d.chance(0.7) else x
    if rows and rows[-1] > 1 and d.chance(0.1):  # rows that are one in memory
        given = x[..., :1, :].expand(x.shape)

    def call(of: Tensor = given) -> dict[str, Tensor]:
        return {"out": diffqkv.packed_linear(of, weight, n, **options)}

    results = here.call(call)
    out = results["out"]
    check(out.dtype == dtype and out.is_contiguous() and tuple(out.shape) == (*rows, n), "out: another kind of tensor")
    p = precision_of(dtype, here.kernels)
    flat = numbers(given).reshape(-1, k)
    with np.errstate(all="ignore"):
        wanted = oracle.linear(flat, weights, None if bias is None else numbers(bias), p, here.kernels)
    close("out", out.reshape(-1, n), wanted.values["out"], wanted.allowed["out"])
    finite = np.isfinite(flat).all(1)
    check(not out.reshape(-1, n)[torch.from_numpy(~finite)].isfinite().any(), "out: a number of what is none")
    here.check_threads(call, results)
    if here.kernels and out.numel() and d.chance(0.5):
        at = d.integer(0, len(flat) - 1)
        alone = here.call(lambda: call(given.reshape(-1, k)[at]))
        same_bits(f"row {at} alone", alone["out"], out.reshape(-1, n)[at])
