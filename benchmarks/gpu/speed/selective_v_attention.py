"""selective_v_attention, beside decode_attention on as many tokens."""

from __future__ import annotations

from functools import partial

import torch

from diffqkv.benchmarks.common.accuracy import difference
from diffqkv.benchmarks.common.inputs import N_K, N_Q, N_V, as_caches
from diffqkv.benchmarks.common.line import Contenders
from diffqkv.benchmarks.common.targets import OWN_DENSE
from diffqkv.benchmarks.common.timing import pool
from diffqkv.ops.dispatch import OPS

from ..context import Context
from .base import K, Peaks, add_line, cached, fits, limit, random, sized, target

_target = partial(target, "selective_v_attention", OWN_DENSE, "≥")
TARGETS = [
    _target(2.0, lambda x: (x["batch"], x["tokens"]) == (1, 32768)),
    _target(4.0, lambda x: x["batch"] * x["tokens"] >= 512 * 1024),
    # Never slower: short caches are for the dense kernel.
    _target(0.98, lambda x: x["batch"] * x["tokens"] < 32 * 1024),
]

_TOP_K = 100
_LINES = [(1, 32 * K), (16, 32 * K), (1, 128 * K), (1, 512 * K), (4, 128 * K), (1, 8 * K), (64, 8 * K)]
_LINES_ON_CPU = [(1, 512), (2, 256)]


@torch.no_grad()
def selective_v_attention(context: Context, peaks: Peaks) -> None:
    for batch, tokens in _LINES if context.on_gpu else _LINES_ON_CPU:
        _selective_line(context, peaks, batch, tokens)


def _selective_line(context: Context, peaks: Peaks, batch: int, tokens: int, d: int = 64) -> None:
    k_bytes, v_bytes = 2 * batch * N_K * d * tokens, 2 * batch * N_V * d * tokens
    nbytes = k_bytes + 2 * batch * N_Q * min(_TOP_K, tokens) * d  # rows of V, if no two heads share one
    size, timer = sized(batch, tokens, (d, d), nbytes), context.timer(graph=True)
    if not fits(context, size, timer.sets(nbytes) * (k_bytes + v_bytes) + 16 * tokens * (N_Q + N_V * d)):
        return
    q = random(context, batch, N_Q, 1, d)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = pool(timer, nbytes, lambda: as_caches(*cached(context, batch, tokens, (d, d))))
    ours = [partial(context.op("selective_v_attention"), q, *layer, lengths, _TOP_K) for layer in layers]
    dense = [partial(context.op("decode_attention"), q, *layer, lengths) for layer in layers]
    one = (q[:1], *(x[:1] for x in layers[0]), lengths[:1], _TOP_K)
    error = difference(ours[0]()[0][:1], OPS["selective_v_attention"].composed(*one)[0])
    who = Contenders(error, ours, {OWN_DENSE: dense}, limit("read", peaks), nbytes)
    add_line(context, "selective_v_attention", size, who, {}, graph=True, targets=TARGETS)
