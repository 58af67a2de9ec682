"""kv_cache_update beside a plain copy of as many bytes, and beside plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from .cases import PANELS, Call, Case, make_call, writable_positions
from .context import Context, load_reference
from .probes import copy_gb_s, median_ms

_SIGMA = Case(4, 16, 64, 64, batch=1, s_new=1, rope="full", bad_positions=False)
_CASES = {
    "decode, batch 1": replace(_SIGMA, capacity=4096),
    "decode, batch 32": replace(_SIGMA, batch=32, capacity=4096),
    "decode, batch 256": replace(_SIGMA, batch=256, capacity=1024),
    "decode, batch 32, paged": replace(_SIGMA, batch=32, capacity=4096, paged=True),
    "decode, batch 32, panels": replace(_SIGMA, batch=32, capacity=4096, k_layout=PANELS),
    "prefill 512": replace(_SIGMA, s_new=512, capacity=4096),
    "prefill 4096": replace(_SIGMA, s_new=4096, capacity=4096),
    "prefill 32768": replace(_SIGMA, s_new=32768, capacity=32768),
    "prefill 32768, no v_stats": replace(_SIGMA, s_new=32768, capacity=32768, stats=False),
    "prefill 32768, panels": replace(_SIGMA, s_new=32768, capacity=32768, k_layout=PANELS),
}
_L2_BYTES = 256 << 20  # rotating through more than this, no set is still in the L2 when its turn comes
_MOST_SETS, _LEAST_SETS = 24, 4


def _moved_bytes(call: Call) -> int:
    """Read: new rows, angles, positions. Written: rows. v_stats both ways."""
    options = call.options
    tables = sum(options[name].nbytes for name in ("cos", "sin"))
    stats = 0 if options["v_stats"] is None else 2 * options["v_stats"].nbytes
    return 2 * (call.k.nbytes + call.v.nbytes) + tables + stats + call.positions.nbytes


def _graph_us(works: list[Callable[[], None]]) -> float:
    """Device time of one of works, each with tensors of its own, from replays of a graph of all."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return median_ms(graph.replay) * 1e3 / len(works)


def _plain_torch(call: Call, rotate: Callable) -> Callable[[], None]:
    """Rotation and index_put; rows only."""
    page_size = call.v_cache.shape[2]
    cos, sin, table = (call.options[name] for name in ("cos", "sin", "block_table"))

    def write() -> None:
        page = torch.arange(len(call.positions), device="cuda")[:, None]
        slot = call.positions
        if table is not None:
            page, slot = table.long().gather(1, slot // page_size), slot % page_size
        k = rotate(call.k, cos, sin).to(call.k.dtype)
        for cache, new in ((call.k_cache, k), (call.v_cache, call.v)):
            groups = cache.shape[1]
            cache[page, :, slot] = new.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4)
        if call.options["v_stats"] is not None:
            stats = call.options["v_stats"]
            stats[..., :-1] += call.v.float().sum(2)
            stats[..., -1] = torch.maximum(stats[..., -1], call.v.float().norm(dim=-1).amax(2))

    return write


def _host_us(call: Call, op) -> float:
    """Host time of an eager call, the device far behind or not."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        call.run(op)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 200 * 1e6


def _row(name: str, case: Case, op, rotate: Callable, peak: float) -> dict:
    probe = make_call(case, 0, torch.device("cuda"))
    footprint = max(_moved_bytes(probe), 1)
    sets = min(_MOST_SETS, max(_LEAST_SETS, -(-_L2_BYTES // footprint)))
    calls = [probe] + [make_call(case, seed, torch.device("cuda")) for seed in range(1, sets)]
    kernel_us = _graph_us([lambda call=call: call.run(op) for call in calls])
    copies = [torch.empty(2, footprint // 2, dtype=torch.uint8, device="cuda") for _ in calls]
    copy_us = _graph_us([lambda x=x: x[1].copy_(x[0]) for x in copies])
    del copies
    gb_s = footprint / kernel_us / 1e3
    row = {"name": name, "bytes": footprint, "kernel_us": kernel_us, "copy_us": copy_us, "gb_s": gb_s}
    row |= {"of_copy": gb_s / peak, "torch_us": None, "speedup": None, "call_us": _host_us(probe, op)}
    if case.k_layout != PANELS:
        call, other = (make_call(case, 99, torch.device("cuda")) for _ in range(2))
        call.run(op)
        _plain_torch(other, rotate)()
        written = bool((writable_positions(call) >= 0).all())
        pairs = ((call.k_storage, other.k_storage), (call.v_storage, other.v_storage))
        if not written or not all(torch.allclose(a, b, rtol=0.02, atol=0.02, equal_nan=True) for a, b in pairs):
            raise RuntimeError(f"{name}: the kernel and plain torch disagree, so their times are not compared")
        row["torch_us"] = _graph_us([_plain_torch(call, rotate) for call in calls])
        row["speedup"] = row["torch_us"] / kernel_us
    return row


def timing(context: Context) -> None:
    op, rotate = context.load_op(), load_reference().rotate
    peak = copy_gb_s()
    context.result |= {"copy_gb_s": peak, "rows": []}
    for name, case in _CASES.items():
        context.result["rows"].append(_row(name, case, op, rotate, peak))
        context.save()
        torch.cuda.empty_cache()
