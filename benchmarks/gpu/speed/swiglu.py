"""swiglu and swiglu_backward."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from diffqkv.benchmarks.common.accuracy import difference
from diffqkv.benchmarks.common.line import Contenders
from diffqkv.benchmarks.common.timing import pool
from diffqkv.ops.dispatch import OPS

from ..context import Context
from .base import Peaks, Size, add_line, limit, random

_LINES = [(1, 6144), (64, 6144), (4096, 6144), (16384, 6144)]
_LINES_ON_CPU = [(4, 100)]


def _several(context: Context, count: int, *shape: int) -> list[Tensor]:
    return [random(context, *shape) for _ in range(count)]


def swiglu(context: Context, peaks: Peaks) -> None:
    timer = context.timer(graph=True)
    for rows, columns in _LINES if context.on_gpu else _LINES_ON_CPU:
        for of_op, reads, writes in ((OPS["swiglu"], 2, 1), (OPS["swiglu"].backward, 3, 2)):
            name = of_op.name
            nbytes = 2 * rows * columns * (reads + writes)
            inputs = pool(timer, nbytes, partial(_several, context, reads, rows, columns))
            ours, of_torch = ([partial(f, *x) for x in inputs] for f in (context.op(name), of_op.composed))
            error = difference(ours[0](), of_torch[0]())
            who = Contenders(error, ours, {"torch": of_torch}, limit("copy", peaks), nbytes)
            add_line(context, name, Size(f"{name}, {rows} x {columns}", nbytes=nbytes), who, {}, graph=True)
