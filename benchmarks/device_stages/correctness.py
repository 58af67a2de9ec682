"""kv_cache_update against plain torch, under graph capture, and bit for bit against itself."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from .cases import PANELS, ROWS, Call, Case, bits, expected, grid, make_call
from .context import Context, load_reference

_REPEATS = {"cuda": 1000, "cpu": 20}
_LARGE_BYTES = 12 << 30


def _compare(got: Call, want: Call, rope: bool) -> tuple[list[str], bool]:
    """What is wrong, and whether K has the reference's bits. Rotated K may differ by one rounding; nothing else may."""
    problems = []
    got_k, want_k = got.k_storage.cpu(), want.k_storage
    k_differs = bits(got_k) != bits(want_k)
    if rope:
        # The two products of a rotation may cancel: what counts as rounding is relative to them, up to about 2 max |k|.
        bound = torch.finfo(want_k.dtype).eps * want_k.float().abs() + 2**-22 * 2 * want.k.float().abs().max()
        k_wrong = k_differs & ~((got_k.float() - want_k.float()).abs() <= bound)
    else:
        k_wrong = k_differs
    if k_wrong.any():
        problems.append(f"k_cache: {int(k_wrong.sum())} of {k_wrong.numel()} elements wrong")
    v_wrong = bits(got.v_storage.cpu()) != bits(want.v_storage)
    if v_wrong.any():
        problems.append(f"v_cache: {int(v_wrong.sum())} of {v_wrong.numel()} elements wrong")
    stats, want_stats = got.options["v_stats"], want.options["v_stats"]
    if stats is not None:
        error = (stats.cpu() - want_stats).abs()
        if not bool((error <= 1e-5 * (1 + want_stats.abs()) * max(1, want.k.shape[2]) ** 0.5).all()):
            problems.append(f"v_stats: error up to {float(error.max()):.3g}")
    return problems, not bool(k_differs.any())


def correctness(context: Context) -> None:
    op, cache_update = context.load_op(), load_reference().cache_update
    counts = {"cases": 0, "exact": 0, "rounded": 0}
    context.result |= counts
    for seed, case in enumerate(grid(bad_positions=context.on_gpu)):
        call = make_call(case, seed, context.device)
        call.run(op)
        problems, exact = _compare(call, expected(case, seed, cache_update), case.rope != "none")
        counts["cases"] += 1
        counts["exact" if exact else "rounded"] += 1
        context.result |= counts
        for problem in problems:
            context.fail(f"{case}: {problem}")
        if seed % 50 == 0:
            context.save()
    _nothing_to_do(context, op)
    _refused_positions(context, op)
    if context.on_gpu:
        _large_offsets(context, op)


def _nothing_to_do(context: Context, op) -> None:
    """No new token, no batch, and nothing but skipped tokens."""
    skipped = make_call(Case(4, 16, 64, 64, batch=2, s_new=3), 0, context.device)
    skipped.positions.fill_(-1)
    calls = {"skipped tokens": skipped}
    for name, case in (("s_new 0", Case(4, 16, 64, 64, batch=2, s_new=0, bad_positions=False)),):
        calls[name] = make_call(case, 0, context.device)
    for name, call in calls.items():
        before = [x.clone() for x in call.written()]
        call.run(op)
        if not all(map(torch.equal, before, call.written())):
            context.fail(f"{name}: something was written")


def _refused_positions(context: Context, op) -> None:
    """Where positions are checked (CPU; CUDA with DIFFQKV_DEBUG=1) a bad one raises, and nothing is written."""
    os.environ["DIFFQKV_DEBUG"] = "1"
    try:
        for paged in (False, True):
            for layout in (ROWS, PANELS):
                case = Case(4, 16, 64, 64, batch=2, s_new=9, k_layout=layout, paged=paged, bad_positions=False)
                for position in (case.capacity + 64 * paged, -2):
                    call = make_call(case, 1, context.device)
                    call.positions[1, 8] = position
                    before = [x.clone() for x in call.written()]
                    try:
                        call.run(op)
                    except RuntimeError as error:
                        if "positions: got" not in str(error):
                            context.fail(f"{case}: position {position} raised another error: {error}")
                    else:
                        context.fail(f"{case}: position {position} was not refused")
                    if not all(map(torch.equal, before, call.written())):
                        context.fail(f"{case}: position {position} was refused after something was written")
    finally:
        del os.environ["DIFFQKV_DEBUG"]


def _large_offsets(context: Context, op) -> None:
    """Rows behind element 2^31 of a cache; an offset that wraps would write near its start."""
    if torch.cuda.mem_get_info()[0] < _LARGE_BYTES:
        context.result["large_offsets"] = "not run: less than 12 GiB free"
        return
    tokens, d = 2**25 + 64, 64
    caches = [torch.zeros(1, 1, tokens, 1, d, dtype=torch.bfloat16, device=context.device) for _ in range(2)]
    new = [torch.rand(1, 1, 4, d, device=context.device).add_(1).bfloat16() for _ in range(2)]
    positions = torch.tensor([[tokens - 1, 2**25, 2**25 - 1, 0]], device=context.device)
    op(*caches, *new, positions)
    for name, cache, rows in zip(("k_cache", "v_cache"), caches, new, strict=True):
        at = cache[0, 0, positions[0], 0]
        others = int(sum(torch.count_nonzero(part) for part in cache.view(-1, d).split(2**22))) - at.numel()
        if not torch.equal(at, rows[0, 0]) or others != 0:
            context.fail(f"large offsets, {name}: wrong rows, or {others} elements written elsewhere")
    context.result["large_offsets"] = "run"


def graph(context: Context) -> None:
    """Captured with a short context; replayed with new tokens, positions and pages up to the cache's end."""
    op = context.load_op()
    context.result["replays"] = 0
    for layout in (ROWS, PANELS):
        for paged in (False, True):
            case = Case(4, 16, 64, 64, batch=2, s_new=2, k_layout=layout, paged=paged, rope="full", bad_positions=False)
            captured, eager = (make_call(case, 3, context.device) for _ in range(2))
            make_call(case, 3, context.device).run(op)  # the first launch loads the module, which capture forbids
            torch.cuda.synchronize()
            captured.positions.copy_(torch.tensor([[0, 1], [0, -1]]))
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording):
                captured.run(op)
            if not all(bool(x.isnan().all()) for x in (captured.k_storage, captured.v_storage)):
                context.fail(f"{case}: capture ran the kernel")
            moved = None if not paged else eager.options["block_table"].flip(0)
            for step in range(2, case.capacity, 2):
                new = make_call(case, 100 + step, context.device)
                positions = torch.tensor([[step, step + 1], [step + 1, -1 if step % 3 else case.capacity + step]])
                for call in (captured, eager):
                    call.k.copy_(new.k)
                    call.v.copy_(new.v)
                    call.positions.copy_(positions)
                    if paged and step == case.capacity // 2:  # the sequences trade pages
                        call.options["block_table"].copy_(moved)
                recording.replay()
                eager.run(op)
                context.result["replays"] += 1
                if not all(map(torch.equal, captured.written(), eager.written())):
                    context.fail(f"{case}: replay at position {step} differs from an eager call")
                    break
            context.save()


def repeat(context: Context) -> None:
    """The same bits every time, and v_stats the same however the tokens are spread over calls."""
    op, repeats = context.load_op(), _REPEATS[context.device.type]
    context.result["repetitions"] = 0
    small = Case(4, 16, 64, 64, batch=3, s_new=70, rope="full", bad_positions=context.on_gpu)
    for case in (small, replace(small, k_layout=PANELS, paged=True, dtype=torch.float16, d_v=256)):
        first = make_call(case, 5, context.device)
        first.run(op)
        call = make_call(case, 5, context.device)
        stats = call.options["v_stats"].clone()
        different = torch.zeros((), dtype=torch.int64, device=context.device)
        for _ in range(repeats):
            call.k_storage.fill_(float("nan"))
            call.v_storage.fill_(float("nan"))
            call.options["v_stats"].copy_(stats)
            call.run(op)
            for got, want in zip(call.written(), first.written(), strict=True):
                different += (got != want).any()
        context.result["repetitions"] += repeats
        if int(different) != 0:
            context.fail(f"{case}: {int(different)} results of {repeats} repetitions differ")

        pieces = make_call(case, 5, context.device)
        for begin, end in ((0, 1), (1, 34), (34, 34), (34, 70)):
            part = slice(begin, end)
            options = dict(pieces.options)
            for name in ("cos", "sin"):
                options[name] = options[name][:, part]
            tokens = pieces.k[:, :, part], pieces.v[:, :, part], pieces.positions[:, part]
            op(pieces.k_cache, pieces.v_cache, *tokens, **options)
        if not all(map(torch.equal, pieces.written(), first.written())):
            context.fail(f"{case}: tokens written in pieces give other bits than in one call")
        context.save()
