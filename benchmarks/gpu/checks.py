"""The checks that say whether an op is right: each is a function of the context and the op's name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from diffqkv.benchmarks.common.accuracy import bits, same_bits
from diffqkv.ops import dispatch

from .calls import TESTED_OPS, Call
from .calls.kv_cache_update import UpdateCase
from .context import Context

_REPEATS = {"cuda": 1000, "cpu": 4}
_STREAMS = 4
_FAR = {"cuda": 2**31 + 4096, "cpu": 2**20}  # elements


def smoke(context: Context, name: str) -> None:
    """One small call: whether it comes back at all, then whether it is right."""
    text, make = context.calls(name)[0]
    call = make()
    context.synchronize()
    context.result["reached"] = "launch"
    context.save()
    results = call.run(context.op(name))
    context.synchronize()
    context.result["reached"] = "results"
    context.save()
    for wrong in call.verify(results):
        context.fail(f"{text}: {wrong}")


def correctness(context: Context, name: str) -> None:
    """All cases, against the reference in float64."""
    context.result["cases"] = 0
    for text, make in context.calls(name):
        call = make()
        context.poison()
        try:
            wrong = call.verify(call.run(context.op(name)))
        except RuntimeError as error:
            wrong = [f"raised {error}"]
        for what in wrong:
            context.fail(f"{text}: {what}")
        context.result["cases"] += 1
        if context.result["cases"] % 20 == 0:
            context.save()
    if name == "kv_cache_update":
        _refused_positions(context)


def _refused_positions(context: Context) -> None:
    """Where positions are checked (CPU; CUDA with DIFFQKV_DEBUG=1) a bad one raises, and nothing is written."""
    op, tested = context.op("kv_cache_update"), TESTED_OPS["kv_cache_update"]
    os.environ["DIFFQKV_DEBUG"] = "1"
    try:
        for paged in (False, True):
            for layout in ("rows", "panels"):
                case = UpdateCase(s_new=9, k_layout=layout, paged=paged)
                for position in (case.capacity + 64 * paged, -2):
                    call = tested.make(case, 1, context.device)
                    call.args["positions"][1, 8] = position
                    before = {x: y.clone() for x, y in call.written.items()}
                    try:
                        call.run(op)
                    except RuntimeError as error:
                        if "positions: got" not in str(error):
                            context.fail(f"{case}: position {position} raised another error: {error}")
                    else:
                        context.fail(f"{case}: position {position} was not refused")
                    if same_bits(call.written, before):
                        context.fail(f"{case}: position {position} was refused after something was written")
    finally:
        del os.environ["DIFFQKV_DEBUG"]


def stability(context: Context, name: str) -> None:
    """The same bits every time, and of every batch entry whether or not there are others."""
    for text, make in context.calls(name, stable=True):
        call = make()
        first = {x: y.clone() for x, y in call.run(context.op(name)).items()}
        _repeat(context, name, text, call, first)
        _alone(context, name, text, call, first)
        context.save()
    if context.on_gpu and name in _GRAPHS:
        _GRAPHS[name](context, name)


def _repeat(context: Context, name: str, text: str, call: Call, first: dict[str, Tensor]) -> None:
    """Repeats the call, on several streams at once unless the op writes its arguments."""
    op, repeats = context.op(name), _REPEATS[context.device.type]
    streams = [None]
    if context.on_gpu and not call.written:
        streams = [torch.cuda.Stream() for _ in range(_STREAMS)]
    different = [torch.zeros((), dtype=torch.int64, device=context.device) for _ in streams]
    context.synchronize()
    for i in range(repeats):
        count = different[i % len(streams)]
        with torch.cuda.stream(streams[i % len(streams)]):
            call.reset()
            for x, y in call.run(op).items():
                count += (bits(y) != bits(first[x])).any()
    context.synchronize()
    context.result["repetitions"] = context.result.get("repetitions", 0) + repeats
    if total := int(sum(different)):
        context.fail(f"{text}: {total} results of {repeats} repetitions differ from the first")


def _alone(context: Context, name: str, text: str, call: Call, first: dict[str, Tensor]) -> None:
    tested = TESTED_OPS[name]
    for entry in range(tested.entries(call)):
        alone, part = tested.alone(call, entry)
        want = part(first)
        got = alone.run(context.op(name))
        if wrong := same_bits({x: got[x] for x in want}, want):
            context.fail(f"{text}: {', '.join(wrong)} of entry {entry} differ where it is alone")
        context.result["entries_alone"] = context.result.get("entries_alone", 0) + 1


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def _capture(call: Call, op: Callable) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    call.run(op)  # the first launch loads the module, which capture forbids
    call.reset()
    torch.cuda.synchronize()
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        results = call.run(op)
    return recording, results


def _replay_over_a_cache(context: Context, name: str) -> None:
    """Captured with one token in the cache, replayed with ever more, new queries and other pages."""
    tested, op = TESTED_OPS[name], context.op(name)
    plain = tested.cases(context.dtypes(name), True)[0]
    for page in (0, 32):
        case = replace(plain, capacity=9000, page=page, full=True, s_q=2)
        captured, eager = (tested.make(case, 7, context.device) for _ in range(2))
        captured.args["cache_seqlens"].fill_(1)
        recording, replayed = _capture(captured, op)
        for step, length in enumerate((1, 2, 31, 33, 127, 129, 700, 1025, 4096, 8191, 9000)):
            lengths = torch.tensor([length, max(0, length - 5)], dtype=torch.int32)
            queries = torch.randn(captured.args["q"].shape, generator=torch.Generator().manual_seed(step))
            for call in (captured, eager):
                call.args["cache_seqlens"].copy_(lengths)
                call.args["q"].copy_(queries)
                if page and step == 5:  # the sequences trade pages
                    call.args["block_table"].copy_(call.args["block_table"].flip(0))
            recording.replay()
            context.result["replays"] = context.result.get("replays", 0) + 1
            if wrong := same_bits(eager.run(op), replayed):
                context.fail(f"{case}: {', '.join(wrong)} of a replay at length {length} differ from an eager call")


def _replay_updates(context: Context, name: str) -> None:
    """Captured at the beginning of a cache, replayed with new tokens, positions and pages up to its end."""
    tested, op = TESTED_OPS[name], context.op(name)
    for layout in ("rows", "panels"):
        for paged in (False, True):
            case = UpdateCase(s_new=2, k_layout=layout, paged=paged, rope="full")
            captured, eager = (tested.make(case, 3, context.device) for _ in range(2))
            captured.args["positions"].copy_(torch.tensor([[0, 1], [0, -1]]))
            recording, _ = _capture(captured, op)
            if not all(bool(captured.written[x].isnan().all()) for x in ("k_cache", "v_cache")):
                context.fail(f"{case}: capture ran the kernel")
            moved = eager.args["block_table"].flip(0) if paged else None
            for step in range(2, case.capacity, 2):
                new = tested.make(case, 100 + step, context.device)
                nowhere = case.capacity + step if context.on_gpu and step % 3 == 0 else -1  # the CPU raises
                positions = torch.tensor([[step, step + 1], [step + 1, nowhere]])
                for call in (captured, eager):
                    call.args["k"].copy_(new.args["k"])
                    call.args["v"].copy_(new.args["v"])
                    call.args["positions"].copy_(positions)
                    if paged and step == case.capacity // 2:  # the sequences trade pages
                        call.args["block_table"].copy_(moved)
                recording.replay()
                eager.run(op)
                context.result["replays"] = context.result.get("replays", 0) + 1
                if wrong := same_bits(captured.written, eager.written):
                    context.fail(f"{case}: {', '.join(wrong)} of a replay at position {step} differ from an eager call")
                    break


_GRAPHS = {
    "decode_attention": _replay_over_a_cache,
    "selective_v_attention": _replay_over_a_cache,
    "kv_cache_update": _replay_updates,
}


# ---- PyTorch's contract ----------------------------------------------------------------------------------------------


def contract(context: Context, name: str) -> None:
    """opcheck: schema, fake kernel, autograd registration, torch.compile with dynamic shapes."""
    warnings.filterwarnings("ignore", message="Input #. requires gradient and is not a double precision")
    for text, make in context.calls(name)[:2]:
        args = make().args
        # It compares arguments before and after, in which NaN is not NaN.
        args = {x: y.nan_to_num(0.5) if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in args.items()}
        for differentiable in (False, True) if name in dispatch.BACKWARD else (False,):
            if differentiable:
                args |= {x: args[x].detach().requires_grad_() for x in ("q", "k", "v", "gate", "up") if x in args}
            try:
                torch.library.opcheck(context.op(name), (), args)
            except Exception as error:  # opcheck raises many types
                context.fail(f"{text}{', with gradients' * differentiable}: {str(error)[-600:]}")
            context.result["opchecks"] = context.result.get("opchecks", 0) + 1


# ---- offsets that do not fit into 32 bits ----------------------------------------------------------------------------


def large(context: Context, name: str) -> None:
    """The same bits from tensors whose last index in a dimension lies more than 2^31 elements after the first."""
    distance = _FAR[context.device.type]
    tested = TESTED_OPS[name]
    if not tested.any_strides:
        return _many_elements(context, name, distance)
    reserve = torch.empty(4 * (distance + 2**24), dtype=torch.uint8, device=context.device)  # hardly ever touched
    for case in tested.stable_cases(context.dtypes(name), False):
        near = tested.make(case, 11, context.device)
        want = {x: y.clone() for x, y in near.run(context.op(name)).items()}
        for argument in tested.any_strides:
            inside = 3 if argument == "k_cache" and near.args.get("k_layout") else 1  # a panel is contiguous
            for dim in range(near.args[argument].dim() - inside):
                near.reset()
                if (moved := _moved_apart(near.args[argument], dim, distance, reserve)) is None:
                    continue
                results = replace(near, args=near.args | {argument: moved}).run(context.op(name))
                if wrong := same_bits(results | ({argument: moved} if argument in want else {}), want):
                    steps = f"{moved.stride(dim)} elements between indices of dimension {dim}"
                    context.fail(f"{case}: {', '.join(wrong)} with {steps} of {argument}")
                context.result["far_strides"] = context.result.get("far_strides", 0) + 1


def _moved_apart(x: Tensor, dim: int, distance: int, reserve: Tensor) -> Tensor | None:
    """x with `distance` elements from the first to the last index of dim; None if there is only one."""
    if x.shape[dim] < 2:
        return None
    rest = [size for i, size in enumerate(x.shape) if i != dim]
    strides = list(torch.empty(rest, device="meta").stride())
    strides.insert(dim, max(ceil(distance / (x.shape[dim] - 1) / 64) * 64, prod(rest)))
    return reserve.view(x.dtype).as_strided(x.shape, strides).copy_(x)


def _many_elements(context: Context, name: str, count: int) -> None:
    args: dict[str, Any] = {}
    for x in ("gate", "up", "dout") if name.endswith("backward") else ("gate", "up"):
        args[x] = torch.empty(count, dtype=torch.bfloat16, device=context.device).normal_()
    results = context.op(name)(**args)
    results = (results,) if isinstance(results, Tensor) else results
    for begin in (0, count // 2, count - 4096):
        part = slice(begin, begin + 4096)
        want = context.op(name)(**{x: y[part] for x, y in args.items()})
        for got, wanted in zip(results, (want,) if isinstance(want, Tensor) else want, strict=True):
            if not torch.equal(bits(got[part]), bits(wanted)):
                context.fail(f"{count} elements: those from {begin} on are wrong")
    context.result["elements"] = count
