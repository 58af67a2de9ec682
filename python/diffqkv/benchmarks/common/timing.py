"""Interleaved timing on a CPU or a GPU: every contender runs once per round, so that noise meets all of them alike.

A contender is a list of the same call on data of its own, so that none finds its data in a cache that a model walking
through its layers would have lost. `Clock` and `Events` say how many such sets that takes, and how one sample is taken.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Container
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

# A smaller working set would stay in the L3 of a CPU, where no layout saves anything.
POOL_BYTES = 512 << 20
_COLD = 2.5  # L2 sizes of a GPU between two uses of the same data
_MOST_SETS = 64  # the most sets that take turns on a GPU

Calls = list[Callable[[], object]]
Sampler = Callable[[], float]
T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of each call."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the 25th and the 75th percentile."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2

    def over(self, other: Timing) -> float:
        """How many times as long as `other` this takes: the median over the rounds.

        The memory of some machines changes its speed by the second. Both calls of a round meet the same speed; the
        medians of two whole runs might not, and their quotient would then compare two states of the machine.
        """
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


class Clock:
    """The wall time of calls that a CPU computes. A sample is one call, the next in turn."""

    most_rounds = float("inf")
    disturbed_by_others = True  # other processes on the CPU slow the calls down

    def __init__(self, pool_bytes: int | None = None):
        self.pool_bytes = POOL_BYTES if pool_bytes is None else pool_bytes

    def sets(self, nbytes: int) -> int:
        """How many sets of so many bytes take turns, so that none is in a cache when its turn comes."""
        return ceil(self.pool_bytes / nbytes)

    def sampler(self, calls: Calls) -> Sampler:
        """Warms the calls up; what it returns takes a sample, in seconds of a call."""
        turns = cycle(calls)

        def sample() -> float:
            call = next(turns)
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        sample()
        return sample


class Events:
    """The time of a GPU between two events. A sample is a call's share of all calls in a row.

    graph: they are replayed from a CUDA graph, as in a decoding loop, where the host's time does not count.
    """

    most_rounds = 100
    disturbed_by_others = False

    def __init__(self, graph: bool):
        self.graph = graph

    def sets(self, nbytes: int) -> int:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return max(1, min(_MOST_SETS, ceil(_COLD * l2 / max(1, nbytes))))

    def sampler(self, calls: Calls) -> Sampler:
        def all_of_them() -> None:
            for call in calls:
                call()

        run = all_of_them
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        if self.graph:
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording):
                all_of_them()
            run = recording.replay
            run()
            torch.cuda.synchronize()

        def sample() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / len(calls)

        return sample


Timer = Clock | Events


def pool(timer: Timer, nbytes: int, build: Callable[[], T]) -> list[T]:
    """As many objects of `nbytes` each as take turns."""
    return [build() for _ in range(timer.sets(nbytes))]


def interleaved(
    timer: Timer, contenders: dict[str, Calls], seconds: float, rounds: int = 7, optional: Container[str] = ()
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times each contender, in the order given, for about `seconds` in all and at least `rounds`.

    Returns:
        The times by contender, and the reasons of those in `optional` that have none because they raise.
    """
    samplers, without = {}, {}
    for name, calls in contenders.items():
        try:
            samplers[name] = timer.sampler(calls)
        except Exception as error:  # whatever a peer raises
            if name not in optional:
                raise
            without[name] = first_line(error)
    times: dict[str, Timing] = {name: Timing([]) for name in samplers}
    collects, begin, done = gc.isenabled(), time.perf_counter(), 0
    gc.disable()
    try:
        while done < rounds or (done < timer.most_rounds and time.perf_counter() - begin < seconds):
            for name, sample in samplers.items():
                times[name].samples.append(sample())
            done += 1
    finally:
        if collects:
            gc.enable()
    return times, without


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


class Elsewhere:
    """The share of all CPUs that went to other processes, or other guests of the host, since this was made."""

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float:
        wall, spent = (now - begin for now, begin in zip(self._now(), self._begin, strict=True))
        return max(0.0, spent / wall / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float]:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy - own.user - own.system
