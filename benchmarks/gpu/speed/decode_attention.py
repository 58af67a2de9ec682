"""decode_attention, by the size of the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common import peers
from diffqkv.benchmarks.common.accuracy import difference, distance
from diffqkv.benchmarks.common.inputs import N_K, N_Q, N_V, as_caches
from diffqkv.benchmarks.common.line import Contenders
from diffqkv.benchmarks.common.peers import repeated
from diffqkv.benchmarks.common.targets import OF_LIMIT, OURS, OVER_TWIN, OWN_TWIN
from diffqkv.benchmarks.common.timing import Calls, pool

from ..context import Context
from .base import K, Peaks, add_line, cached, faster_than_peers, fits, limit, random, sized, target

_target = partial(target, "decode_attention")
TARGETS = [
    _target(OF_LIMIT, "≥", 0.88, lambda x: x["nbytes"] >= 64e6),
    _target(OURS, "≤", 8e-6, lambda x: (x["batch"], x["tokens"]) == (1, 4096)),
    _target(OVER_TWIN, "≤", 0.70, lambda x: 4096 <= x["tokens"] < 16384),
    _target(OVER_TWIN, "≤", 0.64, lambda x: x["tokens"] >= 16384),
    *faster_than_peers("decode_attention"),
]

_CONTEXTS = (4 * K, 32 * K, 16 * K, 128 * K, 8 * K, 2 * K, 64 * K)
# In the order of importance.
_LINES = (
    [((64, 64), batch, tokens) for batch in (1, 16, 4, 64) for tokens in _CONTEXTS]
    + [((128, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:4]]
    + [((64, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:2] + _CONTEXTS[3:4]]
)
_LINES_ON_CPU = [((64, 64), 1, 256), ((64, 128), 2, 64)]


@torch.no_grad()
def decode_attention(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _LINES if context.on_gpu else _LINES_ON_CPU:
        _decode_line(context, peaks, dims, batch, tokens)


def _decode_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    d_k, d_v = dims
    nbytes = 2 * batch * tokens * (N_K * d_k + N_V * d_v)
    size, timer = sized(batch, tokens, dims, nbytes), context.timer(graph=True)
    # With K repeated; in float32 while the first entry is checked.
    checked = 4 * tokens * N_Q * (d_k + d_v)
    if not fits(context, size, timer.sets(nbytes) * (nbytes + 2 * batch * tokens * N_V * d_k) + checked):
        return
    op, q = context.op("decode_attention"), random(context, batch, N_Q, 1, d_k)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = pool(timer, nbytes, lambda: cached(context, batch, tokens, dims))
    twins = [(repeated(k, N_V), v) for k, v in layers]
    ours = [partial(op, q, *as_caches(k, v), lengths) for k, v in layers]
    out = ours[0]()[0]
    error = difference(out[:1], reference.attention(q[:1], *(x[:1] for x in layers[0])))

    def twin() -> tuple[Calls, float]:
        calls = [partial(op, q, *as_caches(k, v), lengths) for k, v in twins]
        return calls, distance(calls[0]()[0], out)

    def other(make: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> tuple[Calls, float]:
        calls = [make(k, v) for k, v in twins]
        return calls, distance(calls[0](), out)

    others = {OWN_TWIN: twin}
    for name, backend in peers.BACKENDS.items():
        others[name] = partial(other, partial(partial, peers.sdpa, q, backend=backend))
    if peers.installed("flash_attn"):
        others["flash_attn"] = partial(other, lambda k, v: peers.flash_attn_decode(q, k, v, lengths))
    if peers.installed("flashinfer"):
        others["flashinfer"] = partial(other, lambda k, v: peers.flashinfer_decode(q, k, v))
    who = Contenders(error, ours, {}, limit("read", peaks), nbytes)
    add_line(context, "decode_attention", size, who, others, graph=True, targets=TARGETS)
