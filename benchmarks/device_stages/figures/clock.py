"""Times of calls that take turns: device time from events, or from the replay of a graph; on the CPU, wall time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from math import ceil

import torch

from ..context import Context

Work = Callable[[], object]
_COLD = 2.5  # L2 sizes between two uses of the same data
_MOST_SETS = 64
_MOST_ROUNDS, _LEAST_ROUNDS = 100, 7


def sets_for(context: Context, nbytes: int) -> int:
    """How many sets of so many bytes take turns, so that none is still in the L2 when its turn comes."""
    if not context.on_gpu:
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(_MOST_SETS, ceil(_COLD * l2 / max(1, nbytes))))


def microseconds(
    context: Context, contenders: dict[str, list[Work]], *, graph: bool, seconds: float = 0.25
) -> tuple[dict[str, float], dict[str, str]]:
    """Median time of a call of each contender, and why others have none.

    Each is a list of the same call on sets of tensors of its own, which run one behind another. graph: as in a decoding
    loop, where the host's time does not count.
    """
    runs, without = {}, {}
    for name, works in contenders.items():
        try:
            runs[name] = _prepared(context, works, graph)
        except Exception as error:  # whatever a peer raises
            without[name] = str(error).strip().split("\n")[0][:200]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = time.monotonic(), 0
    while runs and rounds < _MOST_ROUNDS and (rounds < _LEAST_ROUNDS or time.monotonic() - start < seconds):
        for name, run in runs.items():
            samples[name].append(_once(context, run) / len(contenders[name]))
        rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}, without


def _prepared(context: Context, works: list[Work], graph: bool) -> Work:
    def all_of_them() -> None:
        for work in works:
            work()

    if not context.on_gpu:
        all_of_them()
        return all_of_them
    for _ in range(2):
        all_of_them()
    torch.cuda.synchronize()
    if not graph:
        return all_of_them
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        all_of_them()
    recording.replay()
    torch.cuda.synchronize()
    return recording.replay


def _once(context: Context, run: Work) -> float:
    if not context.on_gpu:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
