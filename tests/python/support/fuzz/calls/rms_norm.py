"""Calls of rms_norm."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, NAN, Draw, numbers
from ..oracle import PRECISION
from .base import Circumstances, close, same_bits


def rms_norm(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    shape = [d.length(12) for _ in range(d.integer(0, 3))]
    shape.append(d.choice(d.integer(1, 9), d.length(70), d.integer(1, 3000)))
    size = d.choice(1e-3, 1, 1, 30, 1e3)
    x = d.tensor(*shape, size=size, dtype=dtype)
    special = d.tensor(*shape) > d.choice(3, 10, 10)
    x = torch.where(special, torch.tensor(d.choice(0.0, math.inf, -math.inf, NAN), dtype=dtype), x)
    if d.chance(0.1):
        x = torch.zeros_like(x)
    x = d.laid_out(x, inner=1)
    weight = d.tensor(shape[-1], size=d.choice(1, 1, 10), dtype=d.choice(dtype, torch.float32))
    eps = d.choice(0.0, 1e-6, 1e-5, 0.1)
    d.note(dtype=dtype, shape=shape, strides=x.stride(), weight=weight.dtype, eps=eps)

    def call(rows: Tensor = x) -> dict[str, Tensor]:
        return {"out": diffqkv.rms_norm(rows, weight, eps)}

    results = here.call(call)
    exact = oracle.normalised(numbers(x), numbers(weight), eps)
    p = PRECISION[dtype]
    # The quotient is rounded, and its product with the weight, of which float16 flushes the smallest.
    least = p.least * (1 + np.abs(numbers(weight)))
    close("out", results["out"], exact, (2.01 * p.results + 32 * p.sums) * np.abs(exact) + least)
    here.check_threads(call, results)
    if len(shape) > 1 and shape[0] > 0 and here.kernels:
        row = d.integer(0, shape[0] - 1)
        same_bits("a row alone", here.call(lambda: call(x[row]))["out"], results["out"][row])
