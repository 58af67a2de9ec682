"""kv_cache_update: tokens of a decode step, and whole prompts."""

from __future__ import annotations

from functools import partial

from diffqkv.benchmarks.common.accuracy import difference
from diffqkv.benchmarks.common.line import Contenders
from diffqkv.ops.dispatch import OPS

from ..calls import TESTED_OPS
from ..calls.kv_cache_update import UpdateCase
from ..context import Context
from .base import K, Peaks, Size, add_line, limit

_LINES = {
    "batch 1, one token": UpdateCase(batch=1, s_new=1, rope="full", capacity=4 * K),
    "batch 32, one token": UpdateCase(batch=32, s_new=1, rope="full", capacity=4 * K),
    "batch 32, one token, paged": UpdateCase(batch=32, s_new=1, rope="full", capacity=4 * K, paged=True),
    "batch 256, one token": UpdateCase(batch=256, s_new=1, rope="full", capacity=K),
    "prompt of 4k": UpdateCase(batch=1, s_new=4 * K, rope="full", capacity=4 * K),
    "prompt of 32k": UpdateCase(batch=1, s_new=32 * K, rope="full", capacity=32 * K),
    "prompt of 32k, no v_stats": UpdateCase(batch=1, s_new=32 * K, rope="full", capacity=32 * K, stats=False),
}
_LINES_ON_CPU = {"batch 2, one token": UpdateCase(rope="full"), "prompt of 64": UpdateCase(s_new=64, rope="full")}
_MOST_CACHES = 24  # caches that take turns


def kv_cache_update(context: Context, peaks: Peaks) -> None:
    """The limit is a copy, which reads and writes as many bytes."""
    tested, op = TESTED_OPS["kv_cache_update"], context.op("kv_cache_update")
    for name, case in (_LINES if context.on_gpu else _LINES_ON_CPU).items():
        calls = [tested.make(case, 0, context.device), tested.make(case, 0, context.device)]
        calls[0].run(op)
        composed = OPS["kv_cache_update"].composed
        composed(**calls[1].args)
        got, want = ([x.nan_to_num(0) for x in call.written.values()] for call in calls)
        error = difference(got, want)
        args = calls[0].args
        nbytes = 2 * (args["k"].nbytes + args["v"].nbytes) + args["positions"].nbytes
        nbytes += sum(args[x].nbytes for x in ("cos", "sin"))
        nbytes += 0 if args["v_stats"] is None else 2 * args["v_stats"].nbytes
        count = min(context.timer(graph=True).sets(nbytes), _MOST_CACHES)
        calls += [tested.make(case, seed, context.device) for seed in range(1, count - 1)]
        ours, of_torch = ([partial(f, **call.args) for call in calls] for f in (op, composed))
        who = Contenders(error, ours, {"torch": of_torch}, limit("copy", peaks), nbytes)
        add_line(context, "kv_cache_update", Size(name, nbytes=nbytes), who, {}, graph=True)
