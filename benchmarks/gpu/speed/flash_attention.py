"""flash_attention, causal, of whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import difference, distance, worst
from diffqkv.benchmarks.common.inputs import N_Q
from diffqkv.benchmarks.common.line import Contenders
from diffqkv.benchmarks.common.timing import Calls

from ..context import Context
from .base import Peaks, add_line, faster_than_peers, limit, sized
from .prompts import PROMPTS, PROMPTS_ON_CPU, SLICE, other_calls, prompt, tflops

_tflops = partial(tflops, "flash_attention")
TARGETS = [
    _tflops("64/64", 473, "FA3 on an H100"),
    _tflops("128/128", 688, "cuDNN 9.19 on an H200"),
    _tflops("64/128", 560, "no overlap of softmax and products"),
    *faster_than_peers("flash_attention"),
]


@torch.no_grad()
def flash_attention(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in PROMPTS if context.on_gpu else PROMPTS_ON_CPU:
        _forward_line(context, peaks, dims, batch, tokens)


def _forward_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = prompt(context, dims, batch, tokens)
    ours = partial(context.op("flash_attention"), q, k, v, causal=True)
    out = ours()[0]
    errors = []
    for part, keys in ((slice(0, SLICE), SLICE), (slice(tokens - SLICE, tokens), tokens)):
        want = reference.attention(q[:1, :, part], k[:1, :, :keys], v[:1, :, :keys], causal=True)
        errors.append(difference(out[:1, :, part], want))

    def other(make: Callable) -> tuple[Calls, float]:
        call, _ = make()
        return [call], distance(call(), out)

    others = {name: partial(other, make) for name, make in other_calls(q, k, v).items()}
    flops = batch * N_Q * tokens**2 * (dims[0] + dims[1])  # half of 2 * ...: causal
    size = sized(batch, tokens, dims)
    who = Contenders(worst(errors), [ours], {}, limit("matmul", peaks), flops)
    add_line(context, "flash_attention", size, who, others, graph=False, targets=TARGETS)
