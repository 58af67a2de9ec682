"""What the machine does at best: the work of a line without anything that makes it attention."""

from __future__ import annotations

from itertools import cycle

import torch

from ... import memory
from ..common.line import Limit
from ..common.timing import pool
from .layer import CLOCK

FMA, DOT, READ, COPY = "FMA", "bf16 dot", "read", "copy"
_PROBES = {FMA: 0, DOT: 1, READ: 2}


def _probe(data: torch.Tensor, name: str, rounds: int) -> float:
    return torch.ops.diffqkv.probe(data, _PROBES[name], rounds)


def arithmetic(flops: float, dtype: torch.dtype) -> Limit:
    """As many FLOPs on registers: bf16 dot products where the data is bf16 and the CPU has them, else multiply-adds."""
    nothing = torch.empty(0)
    name = DOT if dtype == torch.bfloat16 and _probe(nothing, DOT, 1) else FMA
    per_round = _probe(nothing, name, 1)
    rounds = round(flops / per_round)
    return Limit(name, "FLOP/s", rounds * per_round, lambda: _probe(nothing, name, rounds))


def _buffers(nbytes: int) -> cycle:
    # Ones: pages of zeros need not be memory of their own. Huge pages, as those of caches and packed weights.
    return cycle(pool(CLOCK, nbytes, lambda: memory.empty((nbytes,), torch.uint8).fill_(1)))


def read(nbytes: int) -> Limit:
    """Reading as many bytes from end to end."""
    data = _buffers(nbytes)
    return Limit(READ, "B/s", _probe(next(data), READ, 1), lambda: _probe(next(data), READ, 1))


def copy(nbytes: int) -> Limit:
    """Reading as many bytes in one place, the same one every time, and writing them to another."""
    source, targets = torch.ones(nbytes, dtype=torch.uint8), _buffers(nbytes)
    return Limit(COPY, "B/s", 2 * nbytes, lambda: next(targets).copy_(source))
