"""Interleaved timing: every contender runs once per round, so that a noisy machine is noisy to all of them alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


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


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Times each contender, in the order given, for about `seconds` in all and at least `rounds`."""
    for call in contenders.values():
        call()
    times: dict[str, Timing] = {name: Timing([]) for name in contenders}
    collects = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        while len(next(iter(times.values())).samples) < rounds or time.perf_counter() - begin < seconds:
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                times[name].samples.append(time.perf_counter() - start)
    finally:
        if collects:
            gc.enable()
    return times


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
