"""The sections of the benchmark: each is a function of the context and of what the probes reached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffqkv import reference
from diffqkv.ops import composed

from ..context import Context
from ..problems import SUBJECTS
from ..problems.cache_update import UpdateCase
from . import peers
from .clock import Work, sets_for
from .lines import N_K, N_Q, N_V, SDPA, add_line, difference, expanded, fits, grouped, random, sdpa

K = 1024
Peaks = dict[str, float]  # read_gb_s, copy_gb_s, bf16_tflops


def _thousands(tokens: int) -> str:
    return f"{tokens // K}k" if tokens % K == 0 else str(tokens)


# ---- decode ----------------------------------------------------------------------------------------------------------

_CONTEXTS = (4 * K, 32 * K, 16 * K, 128 * K, 8 * K, 2 * K, 64 * K)
# In the order of importance.
_DECODE = (
    [((64, 64), batch, tokens) for batch in (1, 16, 4, 64) for tokens in _CONTEXTS]
    + [((128, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:4]]
    + [((64, 128), batch, tokens) for batch in (1, 16) for tokens in _CONTEXTS[:2] + _CONTEXTS[3:4]]
)
_DECODE_ON_CPU = [((64, 64), 1, 256), ((64, 128), 2, 64)]


def decode(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _DECODE if context.on_gpu else _DECODE_ON_CPU:
        with torch.no_grad():
            _decode_line(context, peaks, dims, batch, tokens)


def _decode_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    d_k, d_v = dims
    per_token = 2 * batch * (N_K * d_k + N_V * d_v)
    name = f"batch {batch}, {_thousands(tokens)}, dims {d_k}/{d_v}"
    sets = sets_for(context, per_token * tokens)
    # With K repeated; in float32 while the first entry is checked.
    if not fits(context, sets * tokens * 2 * batch * (N_K * d_k + N_V * (d_k + d_v)) + 4 * tokens * N_Q * (d_k + d_v)):
        context.result.setdefault("left_out", []).append(f"{name}: not enough memory")
        return
    op = context.op("decode_attention")
    q = random(context, batch, N_Q, 1, d_k)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = [(random(context, batch, N_K, tokens, d_k), random(context, batch, N_V, tokens, d_v)) for _ in range(sets)]
    repeated = [(expanded(k, N_V), v) for k, v in layers]
    ours = [partial(op, q, *grouped(k, v), lengths) for k, v in layers]
    out = ours[0]()[0]
    k, v = layers[0]
    error = difference(out[:1], reference.attention(q[:1], k[:1], v[:1]))

    def twin() -> tuple[list[Work], float]:
        works = [partial(op, q, *grouped(k, v), lengths) for k, v in repeated]
        return works, difference(works[0]()[0], out)

    def other(make: Callable[[Tensor, Tensor], Work]) -> tuple[list[Work], float]:
        works = [make(k, v) for k, v in repeated]
        return works, difference(works[0](), out)

    others = {"own GQA-16": twin}
    for peer, backend in SDPA.items():
        others[peer] = partial(other, partial(partial, sdpa, backend, q))
    if peers.module("flash_attn"):
        others["flash_attn"] = partial(other, lambda k, v: peers.flash_attn_decode(q, k, v, lengths))
    if peers.module("flashinfer"):
        others["flashinfer"] = partial(other, lambda k, v: peers.flashinfer_decode(q, k, v))

    def finish(us: dict[str, float]) -> dict:
        gb_s = per_token * tokens / us["ours"] / 1e3
        twin = us.get("own GQA-16")
        return {
            "GB/s": gb_s,
            "of read": gb_s / peaks["read_gb_s"],
            "less than own GQA-16": None if twin is None else 1 - us["ours"] / twin,
        }

    line = {"name": name, "dims": f"{d_k}/{d_v}", "batch": batch, "tokens": tokens, "MB": per_token * tokens / 1e6}
    add_line(context, "decode", line, error, ours, others, finish, graph=True)


# ---- prompts and training --------------------------------------------------------------------------------------------

_DIMS = [(64, 64), (128, 128), (64, 128)]
_PROMPTS = [(dims, tokens) for tokens in (8 * K, 16 * K, 4 * K, 2 * K, K) for dims in _DIMS]
_PROMPTS_ON_CPU = [((64, 64), 128), ((64, 128), 64)]
_SLICE = 64  # rows that are compared with the reference


def _prompts(context: Context) -> list[tuple[tuple[int, int], int, int]]:
    """dims, batch, tokens: as many tokens in all."""
    if not context.on_gpu:
        return [(dims, 1, tokens) for dims, tokens in _PROMPTS_ON_CPU]
    return [(dims, 16 * K // tokens, tokens) for dims, tokens in _PROMPTS]


def _of_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], tuple[Work, tuple[Tensor, Tensor]]]]:
    """Causal attention of others, and the K and V it takes: K with V's heads, or both with q's."""
    repeated = expanded(k, N_V).detach().requires_grad_(q.requires_grad)

    def of_torch(backend: SDPBackend) -> tuple[Work, tuple[Tensor, Tensor]]:
        try:
            call = partial(sdpa, backend, q, repeated, v, causal=True)
            call()
            return call, (repeated, v)
        except RuntimeError:  # it may know no groups
            both = tuple(expanded(x, N_Q).detach().requires_grad_(q.requires_grad) for x in (k, v))
            return partial(sdpa, backend, q, *both, causal=True), both

    calls: dict[str, Callable] = {peer: partial(of_torch, backend) for peer, backend in SDPA.items()}
    if peers.module("flash_attn"):
        calls["flash_attn"] = lambda: (partial(peers.flash_attn_prefill, q, repeated, v), (repeated, v))
    return calls


def prefill(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _prompts(context):
        with torch.no_grad():
            _prefill_line(context, peaks, dims, batch, tokens)


def _prompt(context: Context, dims: tuple[int, int], batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = zip((N_Q, N_K, N_V), (dims[0], *dims), strict=True)
    return tuple(random(context, batch, n, tokens, d) for n, d in heads)


def _prompt_line(dims: tuple[int, int], batch: int, tokens: int) -> dict:
    name = f"batch {batch}, {_thousands(tokens)}, dims {dims[0]}/{dims[1]}"
    return {"name": name, "dims": f"{dims[0]}/{dims[1]}", "batch": batch, "tokens": tokens}


def _finish_flops(flops: float, peaks: Peaks, us: dict[str, float]) -> dict:
    rate = flops / us["ours"] / 1e6
    return {"TFLOP/s": rate, "of matmul": rate / peaks["bf16_tflops"]}


def _prefill_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = _prompt(context, dims, batch, tokens)
    ours = partial(context.op("flash_attention"), q, k, v, causal=True)
    out = ours()[0]
    ends = []
    for part, keys in ((slice(0, _SLICE), _SLICE), (slice(tokens - _SLICE, tokens), tokens)):
        want = reference.attention(q[:1, :, part], k[:1, :, :keys], v[:1, :, :keys], causal=True)
        ends.append(difference(out[:1, :, part], want))

    def other(make: Callable) -> tuple[list[Work], float]:
        call, _ = make()
        return [call], difference(call(), out)

    others = {peer: partial(other, make) for peer, make in _of_peers(q, k, v).items()}
    flops = batch * N_Q * tokens**2 * (dims[0] + dims[1])  # half of 2 * ...: causal
    finish = partial(_finish_flops, flops, peaks)
    add_line(context, "prefill", _prompt_line(dims, batch, tokens), max(ends), [ours], others, finish, graph=False)


def backward(context: Context, peaks: Peaks) -> None:
    for dims, batch, tokens in _prompts(context):
        _backward_line(context, peaks, dims, batch, tokens)


def _backward_line(context: Context, peaks: Peaks, dims: tuple[int, int], batch: int, tokens: int) -> None:
    q, k, v = _prompt(context, dims, batch, tokens)
    dout = random(context, batch, N_Q, tokens, dims[1])
    with torch.no_grad():
        out, lse = context.op("flash_attention")(q, k, v, causal=True)
    ours = partial(context.op("flash_attention_backward"), dout, None, q, k, v, out, lse, causal=True)
    dq, dk, dv, _ = ours()
    # The last queries see all keys, and are all that see the last keys.
    end = slice(tokens - _SLICE, tokens)
    leaves = [x[:1].float().requires_grad_() for x in (q[:, :, end], k, v)]
    want = torch.autograd.grad(reference.attention(*leaves, causal=True), leaves, dout[:1, :, end].float())
    pairs = ((dq, want[0]), (dk, want[1][:, :, end]), (dv, want[2][:, :, end]))
    error = max(difference(got[:1, :, end], exact) for got, exact in pairs)
    del leaves, want, pairs

    def other(make: Callable) -> tuple[list[Work], float]:
        call, (other_k, other_v) = make()
        result = call()
        gradients = partial(torch.autograd.grad, result, (leaves[0], other_k, other_v), dout, retain_graph=True)
        repeated = gradients()[1].float()
        return [gradients], difference(repeated.unflatten(1, (N_K, -1)).sum(2), dk)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    others = {peer: partial(other, make) for peer, make in _of_peers(*leaves).items()}
    flops = batch * N_Q * tokens**2 * (3 * dims[0] + 2 * dims[1])
    finish = partial(_finish_flops, flops, peaks)
    add_line(context, "backward", _prompt_line(dims, batch, tokens), error, [ours], others, finish, graph=False)


# ---- selective V -----------------------------------------------------------------------------------------------------

_TOP_K = 100
_SELECTIVE = [(1, 32 * K), (16, 32 * K), (1, 128 * K), (1, 512 * K), (4, 128 * K), (1, 8 * K), (64, 8 * K)]
_SELECTIVE_ON_CPU = [(1, 512), (2, 256)]


def selective(context: Context, peaks: Peaks) -> None:
    for batch, tokens in _SELECTIVE if context.on_gpu else _SELECTIVE_ON_CPU:
        with torch.no_grad():
            _selective_line(context, peaks, batch, tokens)


def _selective_line(context: Context, peaks: Peaks, batch: int, tokens: int, d: int = 64) -> None:
    k_bytes, v_bytes = 2 * batch * N_K * d * tokens, 2 * batch * N_V * d * tokens
    most = 2 * batch * N_Q * min(_TOP_K, tokens) * d  # V rows, if no two heads choose the same
    name = f"batch {batch}, {_thousands(tokens)}"
    sets = sets_for(context, k_bytes + most)
    if not fits(context, sets * (k_bytes + v_bytes) + 16 * tokens * (N_Q + N_V * d)):
        context.result.setdefault("left_out", []).append(f"{name}: not enough memory")
        return
    q = random(context, batch, N_Q, 1, d)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=context.device)
    layers = [
        grouped(random(context, batch, N_K, tokens, d), random(context, batch, N_V, tokens, d)) for _ in range(sets)
    ]
    ours = [partial(context.op("selective_v_attention"), q, *layer, lengths, _TOP_K) for layer in layers]
    dense = [partial(context.op("decode_attention"), q, *layer, lengths) for layer in layers]
    one = (q[:1], *(x[:1] for x in layers[0]), lengths[:1], _TOP_K)
    error = difference(ours[0]()[0][:1], composed.selective_v_attention(*one)[0])

    def finish(us: dict[str, float]) -> dict:
        gb_s = (k_bytes + most) / us["ours"] / 1e3
        speedup = us["own dense"] / us["ours"] if "own dense" in us else None
        return {"GB/s": gb_s, "of read": gb_s / peaks["read_gb_s"], "times own dense": speedup}

    line = {"name": name, "batch": batch, "tokens": tokens, "K + V rows MB": (k_bytes + most) / 1e6}
    add_line(context, "selective", line, error, ours, {"own dense": lambda: (dense, 0.0)}, finish, graph=True)


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


def cache_update(context: Context, peaks: Peaks) -> None:
    """The limit: a copy, which reads and writes as many bytes."""
    subject, op = SUBJECTS["kv_cache_update"], context.op("kv_cache_update")
    for name, case in (_UPDATES if context.on_gpu else _UPDATES_ON_CPU).items():
        problems = [subject.make(case, 0, context.device), subject.make(case, 0, context.device)]
        composed.kv_cache_update(**problems[1].args)
        problems[0].run(op)
        pairs = zip(problems[0].written.values(), problems[1].written.values(), strict=True)
        error = max(difference(a.nan_to_num(0), b.nan_to_num(0)) for a, b in pairs)
        args = problems[0].args
        nbytes = 2 * (args["k"].nbytes + args["v"].nbytes) + args["positions"].nbytes
        nbytes += sum(args[x].nbytes for x in ("cos", "sin"))
        nbytes += 0 if args["v_stats"] is None else 2 * args["v_stats"].nbytes
        count = sets_for(context, nbytes)
        problems += [subject.make(case, seed, context.device) for seed in range(1, min(count, 24) - 1)]
        ours = [partial(op, **problem.args) for problem in problems]
        calls = [partial(composed.kv_cache_update, **problem.args) for problem in problems]

        def finish(us: dict[str, float], nbytes: int = nbytes) -> dict:
            gb_s = nbytes / us["ours"] / 1e3
            return {"GB/s": gb_s, "of copy": gb_s / peaks["copy_gb_s"]}

        line = {"name": name, "MB": nbytes / 1e6}
        plain = {"torch": lambda calls=calls: (calls, 0.0)}
        add_line(context, "cache_update", line, error, ours, plain, finish, graph=True)


_SWIGLU = [(1, 6144), (64, 6144), (4096, 6144), (16384, 6144)]
_SWIGLU_ON_CPU = [(4, 100)]


def swiglu(context: Context, peaks: Peaks) -> None:
    for rows, columns in _SWIGLU if context.on_gpu else _SWIGLU_ON_CPU:
        for name, reads, writes in (("swiglu", 2, 1), ("swiglu_backward", 3, 2)):
            nbytes = 2 * rows * columns * (reads + writes)
            inputs = [[random(context, rows, columns) for _ in range(reads)] for _ in range(sets_for(context, nbytes))]
            inputs = [x if reads == 2 else [x[2], *x[:2]] for x in inputs]
            ours = [partial(context.op(name), *x) for x in inputs]
            calls = [partial(getattr(composed, name), *x) for x in inputs]
            got, want = ours[0](), calls[0]()
            pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True)
            error = max(difference(a, b) for a, b in pairs)

            def finish(us: dict[str, float], nbytes: int = nbytes) -> dict:
                gb_s = nbytes / us["ours"] / 1e3
                return {"GB/s": gb_s, "of copy": gb_s / peaks["copy_gb_s"]}

            line = {"name": f"{name}, {rows} x {columns}", "MB": nbytes / 1e6}
            plain = {"torch": lambda calls=calls: (calls, 0.0)}
            add_line(context, "swiglu", line, error, ours, plain, finish, graph=True)
