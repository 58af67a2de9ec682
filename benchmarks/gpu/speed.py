"""How fast each op is, beside its peers: functions called as the op, of the context and of what the probes reached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffqkv import reference
from diffqkv.benchmarks.common import peers
from diffqkv.benchmarks.common.accuracy import difference, distance, worst
from diffqkv.benchmarks.common.inputs import N_K, N_Q, N_V, as_caches
from diffqkv.benchmarks.common.line import TRAINING_TOLERANCE, Contenders, Limit, measure
from diffqkv.benchmarks.common.peers import repeated
from diffqkv.benchmarks.common.targets import OWN_DENSE, OWN_TWIN
from diffqkv.benchmarks.common.timing import Calls, first_line, pool
from diffqkv.ops.dispatch import OPS

from .calls import TESTED_OPS
from .calls.kv_cache_update import UpdateCase
from .context import Context
from .targets import TARGETS

K = 1024
_TOLERANCE = 0.02  # twice that of the CPU's lines: some results are compared with others in bfloat16
_APART = 0.04  # the distance of a peer's results from ours
_SECONDS = 0.25  # per line

Peaks = dict[str, float]  # read_gb_s, copy_gb_s, bf16_tflops
# What makes the calls of a peer, and says how far their results are from ours.
Peer = Callable[[], tuple[Calls, float]]


class Size(NamedTuple):
    name: str
    batch: int = 1
    tokens: int = 0
    dims: str = ""
    nbytes: int = 0  # that a call reads and writes

    def __str__(self) -> str:
        return self.name


def _size(batch: int, tokens: int, dims: tuple[int, int], nbytes: int = 0) -> Size:
    thousands = f"{tokens // K}k" if tokens % K == 0 else str(tokens)
    d = "/".join(map(str, dims))
    return Size(f"batch {batch}, {thousands}, dims {d}", batch, tokens, d, nbytes)


def _random(context: Context, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=context.device).normal_()


def _cached(context: Context, batch: int, tokens: int, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tuple(_random(context, batch, heads, tokens, d) for heads, d in zip((N_K, N_V), dims, strict=True))


def _several(context: Context, count: int, *shape: int) -> list[Tensor]:
    return [_random(context, *shape) for _ in range(count)]


def _fits(context: Context, size: Size, nbytes: float) -> bool:
    if context.on_gpu and nbytes >= 0.9 * torch.cuda.mem_get_info()[0]:
        context.result.setdefault("left_out", []).append(f"{size}: not enough memory")
        return False
    return True


def _add_line(context: Context, op: str, size: Size, who: Contenders, others: dict[str, Peer], *, graph: bool) -> None:
    """Measures a line beside those of the others that can be called and compute the same, and appends its record."""
    notes = []
    if who.tolerance is None:
        who = who._replace(tolerance=_TOLERANCE)
    for name, make in others.items() if who.error <= who.tolerance else ():
        try:
            calls, apart = make()
        except Exception as failure:  # whatever a peer raises
            notes.append(f"{name}: {first_line(failure)}")
            continue
        if apart <= _APART:
            who.peers[name] = calls
        else:
            notes.append(f"{name}: another result, {apart:.2g} apart")
    who = who._replace(notes=notes)
    try:
        record = measure(op, size, torch.bfloat16, _SECONDS, who, context.timer(graph), TARGETS)
    except RuntimeError as failure:
        context.fail(f"{size}: {first_line(failure)}")
        return
    if record["correct"]:
        context.result.setdefault("rows", []).append(record)
        context.save()
    else:
        context.fail(f"{size}: error {who.error:.3g}, allowed {who.tolerance}")
    if context.on_gpu:
        torch.cuda.empty_cache()


def _limit(name: str, peaks: Peaks) -> Limit:
    if name == "matmul":
        return Limit(name, "FLOP/s", per_second=peaks["bf16_tflops"] * 1e12)
    return Limit(name, "B/s", per_second=peaks[f"{name}_gb_s"] * 1e9)


# ---- decode ----------------------------------------------------------------------------------------------------------

_CONTEXTS = (4 * K, 32 * K, 16 * K, 128 * K, 8 * K, 2 * K, 64 * K)
# In the order of importance.
_DECODE = (
    [((64, 64), batch, tokens) for batch in (1, 16, 4, 64) for tokens in _CONTEXTS]
    + [((128, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:4]]
    + [((64, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:2] + _CONTEXTS[3:4]]
)
_DECODE_ON_CPU = [((64, 64), 1, 256), ((64, 128), 2, 64)]


@torch.no_grad()
def decode_attention(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _DECODE if context.on_gpu else _DECODE_ON_CPU:
        _decode_line(context, peaks, dims, batch, tokens)


def _decode_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    d_k, d_v = dims
    nbytes = 2 * batch * tokens * (N_K * d_k + N_V * d_v)
    size, timer = _size(batch, tokens, dims, nbytes), context.timer(graph=True)
    # With K repeated; in float32 while the first entry is checked.
    checked = 4 * tokens * N_Q * (d_k + d_v)
    if not _fits(context, size, timer.sets(nbytes) * (nbytes + 2 * batch * tokens * N_V * d_k) + checked):
        return
    op, q = context.op("decode_attention"), _random(context, batch, N_Q, 1, d_k)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = pool(timer, nbytes, lambda: _cached(context, batch, tokens, dims))
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
    who = Contenders(error, ours, {}, _limit("read", peaks), nbytes)
    _add_line(context, "decode_attention", size, who, others, graph=True)


# ---- prompts and training --------------------------------------------------------------------------------------------

_DIMS = [(64, 64), (128, 128), (64, 128)]
_PROMPTS = [(dims, 16 * K // tokens, tokens) for tokens in (8 * K, 16 * K, 4 * K, 2 * K, K) for dims in _DIMS]
_PROMPTS_ON_CPU = [((64, 64), 1, 128), ((64, 128), 1, 64)]
_SLICE = 64  # rows that are compared with the reference


def _others(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """The peers' ways to make their call of causal attention, and the K and V that it takes.

    Each K head is repeated for the V heads that share it, and both for the heads of q where a peer knows no groups.
    """

    def given(x: Tensor, heads: int) -> Tensor:
        return repeated(x, heads).detach().requires_grad_(q.requires_grad)

    k_twin = given(k, N_V)

    def of_torch(backend: SDPBackend) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor]]:
        attention = partial(peers.sdpa, q, causal=True, backend=backend)
        try:
            attention(k=k_twin, v=v)
            both = k_twin, v
        except RuntimeError:  # it may know no groups
            both = given(k, N_Q), given(v, N_Q)
        return partial(attention, *both), both

    calls: dict[str, Callable] = {name: partial(of_torch, backend) for name, backend in peers.BACKENDS.items()}
    if peers.installed("flash_attn"):
        calls["flash_attn"] = lambda: (partial(peers.flash_attn_prompt, q, k_twin, v), (k_twin, v))
    return calls


def _prompt(context: Context, dims: tuple[int, int], batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return _random(context, batch, N_Q, tokens, dims[0]), *_cached(context, batch, tokens, dims)


@torch.no_grad()
def flash_attention(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _PROMPTS if context.on_gpu else _PROMPTS_ON_CPU:
        _forward_line(context, peaks, dims, batch, tokens)


def _forward_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = _prompt(context, dims, batch, tokens)
    ours = partial(context.op("flash_attention"), q, k, v, causal=True)
    out = ours()[0]
    errors = []
    for part, keys in ((slice(0, _SLICE), _SLICE), (slice(tokens - _SLICE, tokens), tokens)):
        want = reference.attention(q[:1, :, part], k[:1, :, :keys], v[:1, :, :keys], causal=True)
        errors.append(difference(out[:1, :, part], want))

    def other(make: Callable) -> tuple[Calls, float]:
        call, _ = make()
        return [call], distance(call(), out)

    others = {name: partial(other, make) for name, make in _others(q, k, v).items()}
    flops = batch * N_Q * tokens**2 * (dims[0] + dims[1])  # half of 2 * ...: causal
    size = _size(batch, tokens, dims)
    who = Contenders(worst(errors), [ours], {}, _limit("matmul", peaks), flops)
    _add_line(context, "flash_attention", size, who, others, graph=False)


def flash_attention_backward(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _PROMPTS if context.on_gpu else _PROMPTS_ON_CPU:
        _backward_line(context, peaks, dims, batch, tokens)


def _backward_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = _prompt(context, dims, batch, tokens)
    dout = _random(context, batch, N_Q, tokens, dims[1])
    with torch.no_grad():
        out, lse = context.op("flash_attention")(q, k, v, causal=True)
    ours = partial(context.op("flash_attention_backward"), dout, None, q, k, v, out, lse, causal=True)
    dq, dk, dv, _ = ours()
    # The last queries see all keys, and are all that see the last keys.
    end = slice(tokens - _SLICE, tokens)
    leaves = [x[:1].float().requires_grad_() for x in (q[:, :, end], k, v)]
    want = torch.autograd.grad(reference.attention(*leaves, causal=True), leaves, dout[:1, :, end].float())
    error = difference([x[:1, :, end] for x in (dq, dk, dv)], [x[:, :, -_SLICE:] for x in want])
    del leaves, want

    def other(make: Callable) -> tuple[Calls, float]:
        call, (other_k, other_v) = make()
        gradients = partial(torch.autograd.grad, call(), (leaves[0], other_k, other_v), dout, retain_graph=True)
        of_k = gradients()[1].float()
        return [gradients], distance(of_k.unflatten(1, (N_K, -1)).sum(2), dk)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    others = {name: partial(other, make) for name, make in _others(*leaves).items()}
    flops = batch * N_Q * tokens**2 * (3 * dims[0] + 2 * dims[1])
    size = _size(batch, tokens, dims)
    who = Contenders(error, [ours], {}, _limit("matmul", peaks), flops, tolerance=TRAINING_TOLERANCE[torch.bfloat16])
    _add_line(context, "flash_attention_backward", size, who, others, graph=False)


# ---- selective V -----------------------------------------------------------------------------------------------------

_TOP_K = 100
_SELECTIVE = [(1, 32 * K), (16, 32 * K), (1, 128 * K), (1, 512 * K), (4, 128 * K), (1, 8 * K), (64, 8 * K)]
_SELECTIVE_ON_CPU = [(1, 512), (2, 256)]


@torch.no_grad()
def selective_v_attention(context: Context, peaks: Peaks) -> None:
    for batch, tokens in _SELECTIVE if context.on_gpu else _SELECTIVE_ON_CPU:
        _selective_line(context, peaks, batch, tokens)


def _selective_line(context: Context, peaks: Peaks, batch: int, tokens: int, d: int = 64) -> None:
    k_bytes, v_bytes = 2 * batch * N_K * d * tokens, 2 * batch * N_V * d * tokens
    nbytes = k_bytes + 2 * batch * N_Q * min(_TOP_K, tokens) * d  # rows of V, if no two heads share one
    size, timer = _size(batch, tokens, (d, d), nbytes), context.timer(graph=True)
    if not _fits(context, size, timer.sets(nbytes) * (k_bytes + v_bytes) + 16 * tokens * (N_Q + N_V * d)):
        return
    q = _random(context, batch, N_Q, 1, d)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = pool(timer, nbytes, lambda: as_caches(*_cached(context, batch, tokens, (d, d))))
    ours = [partial(context.op("selective_v_attention"), q, *layer, lengths, _TOP_K) for layer in layers]
    dense = [partial(context.op("decode_attention"), q, *layer, lengths) for layer in layers]
    one = (q[:1], *(x[:1] for x in layers[0]), lengths[:1], _TOP_K)
    error = difference(ours[0]()[0][:1], OPS["selective_v_attention"].composed(*one)[0])
    who = Contenders(error, ours, {OWN_DENSE: dense}, _limit("read", peaks), nbytes)
    _add_line(context, "selective_v_attention", size, who, {}, graph=True)


# ---- cache update, swiglu --------------------------------------------------------------------------------------------

_UPDATES = {
    "batch 1, one token": UpdateCase(batch=1, s_new=1, rope="full", capacity=4 * K),
    "batch 32, one token": UpdateCase(batch=32, s_new=1, rope="full", capacity=4 * K),
    "batch 32, one token, paged": UpdateCase(batch=32, s_new=1, rope="full", capacity=4 * K, paged=True),
    "batch 256, one token": UpdateCase(batch=256, s_new=1, rope="full", capacity=K),
    "prompt of 4k": UpdateCase(batch=1, s_new=4 * K, rope="full", capacity=4 * K),
    "prompt of 32k": UpdateCase(batch=1, s_new=32 * K, rope="full", capacity=32 * K),
    "prompt of 32k, no v_stats": UpdateCase(batch=1, s_new=32 * K, rope="full", capacity=32 * K, stats=False),
}
_UPDATES_ON_CPU = {"batch 2, one token": UpdateCase(rope="full"), "prompt of 64": UpdateCase(s_new=64, rope="full")}
_MOST_UPDATES = 24  # caches that take turns


def kv_cache_update(context: Context, peaks: Peaks) -> None:
    """The limit is a copy, which reads and writes as many bytes."""
    tested, op = TESTED_OPS["kv_cache_update"], context.op("kv_cache_update")
    for name, case in (_UPDATES if context.on_gpu else _UPDATES_ON_CPU).items():
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
        count = min(context.timer(graph=True).sets(nbytes), _MOST_UPDATES)
        calls += [tested.make(case, seed, context.device) for seed in range(1, count - 1)]
        ours, of_torch = ([partial(f, **call.args) for call in calls] for f in (op, composed))
        who = Contenders(error, ours, {"torch": of_torch}, _limit("copy", peaks), nbytes)
        _add_line(context, "kv_cache_update", Size(name, nbytes=nbytes), who, {}, graph=True)


_SWIGLU = [(1, 6144), (64, 6144), (4096, 6144), (16384, 6144)]
_SWIGLU_ON_CPU = [(4, 100)]


def swiglu(context: Context, peaks: Peaks) -> None:
    timer = context.timer(graph=True)
    for rows, columns in _SWIGLU if context.on_gpu else _SWIGLU_ON_CPU:
        for of_op, reads, writes in ((OPS["swiglu"], 2, 1), (OPS["swiglu"].backward, 3, 2)):
            name = of_op.name
            nbytes = 2 * rows * columns * (reads + writes)
            inputs = pool(timer, nbytes, partial(_several, context, reads, rows, columns))
            ours, of_torch = ([partial(f, *x) for x in inputs] for f in (context.op(name), of_op.composed))
            error = difference(ours[0](), of_torch[0]())
            who = Contenders(error, ours, {"torch": of_torch}, _limit("copy", peaks), nbytes)
            _add_line(context, name, Size(f"{name}, {rows} x {columns}", nbytes=nbytes), who, {}, graph=True)
