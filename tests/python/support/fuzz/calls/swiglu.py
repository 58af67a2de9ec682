"""Calls of swiglu."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, NAN, Draw
from ..oracle import PRECISION, Result
from .base import Circumstances, close


def swiglu(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    shape = [d.length(40) if d.chance(0.5) else d.integer(1, 9) for _ in range(d.integer(0, 4))]
    while math.prod(shape) > 5000:
        shape[shape.index(max(shape))] //= 2
    largest = math.log10(PRECISION[dtype].largest)

    def values(most: float) -> Tensor:
        """Of all magnitudes up to 10^most, or about 1, some of them special."""
        x = d.tensor(*shape).double()
        if d.chance(0.5):
            x = x.sign() * 10 ** (torch.special.ndtr(d.tensor(*shape).double()) * (most + 3) - 3)
        specials = (0.0, -0.0, 1e-40, math.inf, -math.inf, NAN)
        special = d.tensor(*shape) > d.choice(2.5, 10)
        x = torch.where(special, torch.tensor(d.choice(*specials), dtype=x.dtype), x)
        x = x.clamp(-PRECISION[dtype].largest, PRECISION[dtype].largest).to(dtype) if most > 30 else x.to(dtype)
        return _any_strides(d, x)

    d.note(dtype=dtype, shape=shape)
    gate, up, dout = values(largest), values(d.choice(2, 15)), values(d.choice(2, 15))

    def call() -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        out = diffqkv.swiglu(*leaves)
        dgate, dup = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), "dgate": dgate, "dup": dup}

    results = here.call(call)
    wanted = Result()
    for name in results:
        wanted.zeros(name, tuple(shape))
    p = PRECISION[dtype]
    with np.errstate(all="ignore"):
        for at in np.ndindex(*shape):
            x, u, g = (float(t[at]) for t in (gate, up, dout))
            s = oracle.sigmoid(x)
            silu, rest = x * s, oracle.sigmoid(-x)
            slope = s + silu * rest
            # float32 has no sigmoid below 2^-126: what is lost there, before the other factors, is below `least`.
            least, lost = 1e-36, abs(silu) < 1e-30 or x == -math.inf
            relative = p.sums * (16 + 2 * min(abs(x), 100)) + p.results
            grown = abs(g * u) * (s + abs(silu) * rest)
            for name, exact, size, floor, anything in (
                ("out", silu * u, abs(silu * u), abs(u), lost and math.isinf(u)),
                ("dup", silu * g, abs(silu * g), abs(g), lost and math.isinf(g)),
                ("dgate", g * u * slope, grown, abs(g * u) + abs(g) + abs(u), abs(g * u) > 1e37 or math.isinf(x)),
            ):
                unknown = anything and not any(map(math.isnan, (x, u, g)))
                wanted.values[name][at] = exact
                wanted.allowed[name][at] = math.inf if unknown else relative * size + least * floor + p.least
    for name, x in results.items():
        close(name, x, wanted.values[name], wanted.allowed[name])
    here.check_threads(call, results)


def _any_strides(d: Draw, x: Tensor) -> Tensor:
    """The last dimension may have any stride, too."""
    if x.dim() < 2 or d.chance(0.5):
        return d.laid_out(x) if x.dim() else x
    order = list(range(x.dim()))
    d.random.shuffle(order)
    back = [order.index(n) for n in range(x.dim())]
    return d.laid_out(x.permute(order)).permute(back)
