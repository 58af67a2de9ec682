"""flash_attention_backward, causal: the gradients alone, of whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import difference, distance
from diffqkv.benchmarks.common.inputs import N_K, N_Q
from diffqkv.benchmarks.common.line import TRAINING_TOLERANCE, Contenders
from diffqkv.benchmarks.common.timing import Calls

from ..context import Context
from .base import Peaks, add_line, faster_than_peers, limit, random, sized
from .prompts import PROMPTS, PROMPTS_ON_CPU, SLICE, other_calls, prompt, tflops

_tflops = partial(tflops, "flash_attention_backward")
TARGETS = [
    _tflops("64/64", 468, "FA3 on an H100"),
    _tflops("128/128", 581, "cuDNN 9.19 on an H200"),
    _tflops("64/128", 450),
    *faster_than_peers("flash_attention_backward"),
]


def flash_attention_backward(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in PROMPTS if context.on_gpu else PROMPTS_ON_CPU:
        _backward_line(context, peaks, dims, batch, tokens)


def _backward_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = prompt(context, dims, batch, tokens)
    dout = random(context, batch, N_Q, tokens, dims[1])
    with torch.no_grad():
        out, lse = context.op("flash_attention")(q, k, v, causal=True)
    ours = partial(context.op("flash_attention_backward"), dout, None, q, k, v, out, lse, causal=True)
    dq, dk, dv, _ = ours()
    # The last queries see all keys, and are all that see the last keys.
    end = slice(tokens - SLICE, tokens)
    leaves = [x[:1].float().requires_grad_() for x in (q[:, :, end], k, v)]
    want = torch.autograd.grad(reference.attention(*leaves, causal=True), leaves, dout[:1, :, end].float())
    error = difference([x[:1, :, end] for x in (dq, dk, dv)], [x[:, :, -SLICE:] for x in want])
    del leaves, want

    def other(make: Callable) -> tuple[Calls, float]:
        call, (other_k, other_v) = make()
        gradients = partial(torch.autograd.grad, call(), (leaves[0], other_k, other_v), dout, retain_graph=True)
        of_k = gradients()[1].float()
        return [gradients], distance(of_k.unflatten(1, (N_K, -1)).sum(2), dk)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    others = {name: partial(other, make) for name, make in other_calls(*leaves).items()}
    flops = batch * N_Q * tokens**2 * (3 * dims[0] + 2 * dims[1])
    size = sized(batch, tokens, dims)
    who = Contenders(error, [ours], {}, limit("matmul", peaks), flops, tolerance=TRAINING_TOLERANCE[torch.bfloat16])
    add_line(context, "flash_attention_backward", size, who, others, graph=False, targets=TARGETS)
