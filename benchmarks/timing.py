"""Interleaved timing: every contender runs once per round, so that a noisy machine is noisy to all of them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Timing:
    """Seconds of one call."""

    median: float
    spread: float  # half the distance between the 25th and the 75th percentile

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4)
        return Timing(median, (high - low) / 2)


def interleaved(contenders: dict[str, Callable[[int], object]], seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Times each contender, called with the number of the round, for about `seconds` in all and at least `rounds`."""
    for call in contenders.values():
        call(0)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    n = 0
    while n < rounds or (time.perf_counter() - begin < seconds and n < 1000):
        n += 1
        for name, call in contenders.items():
            start = time.perf_counter()
            call(n)
            samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(times) for name, times in samples.items()}
