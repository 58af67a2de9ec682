"""Calls of rotary_embedding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, Draw, numbers
from ..oracle import PRECISION
from .base import Circumstances, close


def rotary_embedding(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    b, t, heads = d.integer(0, 3), d.length(40), d.integer(0, 5)
    size = d.choice(d.dim(), d.integer(1, 70))
    d_rot = d.choice(size // 2 * 2, 2 * d.integer(0, size // 2))
    x = d.laid_out(d.tensor(b, t, heads, size, size=d.choice(0.01, 1, 100), dtype=dtype), inner=1)
    both = d.tensor(2, d.choice(1, b), t, d_rot, dtype=d.choice(dtype, torch.float32))
    cos, sin = both if d.chance(0.5) else d.laid_out(both, inner=1)
    d.note(dtype=dtype, x=list(x.shape), strides=x.stride(), cos=list(cos.shape), angles=cos.dtype)

    def call() -> dict[str, Tensor]:
        return {"out": diffqkv.rotary_embedding(x, cos, sin)}

    results = here.call(call)
    exact, allowed = np.zeros(x.shape), np.zeros(x.shape)
    p = PRECISION[dtype]
    for i, j in np.ndindex(b, t):
        angles = [numbers(a[i % len(a), j]) for a in (cos, sin)]
        exact[i, j], size_of_terms = oracle.rotated(numbers(x[i, j]), *angles)
        allowed[i, j] = 4 * p.sums * size_of_terms + p.results * np.abs(exact[i, j]) + p.least
        allowed[i, j, :, d_rot:] = 0
    close("out", results["out"], exact, allowed)
    here.check_threads(call, results)
