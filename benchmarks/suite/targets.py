"""What each line should reach on two threads.

A target belongs to a column of the table. Limits are measured in the same run, so that most targets hold for any CPU.
Between two lengths that have targets of their own, the weaker one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .limits import DOT

OF_LIMIT = "of limit"
SDPA_REPEATED, SDPA_TWIN, MATMUL = "SDPA, K repeated", "SDPA, GQA-16", "torch matmul"
OWN_DENSE, OWN_MHA = "own dense", "own MHA"
SDPA_MODEL = "through SDPA"
LLAMA = "Llama, GQA-16"
OVER_TWIN = "Sigma / own GQA-16"  # our time over that of the same kernel on the twin

# Some machines' memory has two speeds. Where it is fast, arithmetic no longer hides behind it.
FAST_READ = 50e9  # B/s


class Target(NamedTuple):
    case: str
    column: str
    sign: str
    float32: float | None
    bfloat16: float | None
    tokens: range = range(1 << 40)
    where: Callable[[str, float], bool] = lambda limit, rate: True  # name and rate of the limit


class Bound(NamedTuple):
    sign: str
    value: float

    def reached_by(self, measured: float) -> bool:
        return measured >= self.value if self.sign == "≥" else measured <= self.value


def _dot(limit: str, rate: float) -> bool:
    return limit == DOT


def _no_dot(limit: str, rate: float) -> bool:
    return limit != DOT


def _slow(limit: str, rate: float) -> bool:
    return rate < FAST_READ


def _fast(limit: str, rate: float) -> bool:
    return rate >= FAST_READ


_SHORT, _MIDDLE, _LONG = range(512, 1024), range(512, 2048), range(2048, 1 << 40)

TARGETS = (
    Target("prefill", OF_LIMIT, "≥", 0.65, None, _MIDDLE),
    Target("prefill", OF_LIMIT, "≥", 0.80, None, _LONG),
    Target("prefill", OF_LIMIT, "≥", None, 0.72, _LONG, _dot),
    Target("prefill", OF_LIMIT, "≥", None, 0.75, _LONG, _no_dot),
    Target("prefill", SDPA_REPEATED, "≥", 2.2, 2.0, _SHORT),
    Target("prefill", SDPA_REPEATED, "≥", 1.3, 1.25, range(1024, 1 << 40)),
    Target("decode", OF_LIMIT, "≥", 0.90, 0.90, where=_slow),
    Target("decode", OF_LIMIT, "≥", 0.75, 0.75, where=_fast),
    Target("decode", OVER_TWIN, "≤", 0.70, 0.70, where=_slow),
    Target("decode", OVER_TWIN, "≤", 0.85, 0.85, where=_fast),
    Target("decode", SDPA_REPEATED, "≥", 4, 15),
    Target("decode", SDPA_TWIN, "≥", 2, 10),
    Target("selective_v", OWN_DENSE, "≥", 2, 1.4, range(8192, 1 << 40)),
    Target("training", OF_LIMIT, "≥", 0.60, None, range(1024, 1 << 40)),
    Target("training", SDPA_REPEATED, "≥", 1.3, 6, range(1024, 2048)),
    Target("training", SDPA_REPEATED, "≥", 1.15, 6, _LONG),
    Target("training", OWN_MHA, "≥", 1, 1, range(1024, 1 << 40)),
    Target("call_overhead", SDPA_TWIN, "≥", 0.5, 0.5),
)


def bounds(case: str, dtype: str, tokens: int, limit: str = "", rate: float = 0.0) -> dict[str, Bound]:
    """The targets of a line by column; `limit` and `rate` (FLOP/s or B/s): its limit's name and what it reached."""
    return {
        target.column: Bound(target.sign, value)
        for target in TARGETS
        if target.case == case
        and (value := getattr(target, dtype)) is not None
        and tokens in target.tokens
        and target.where(limit, rate)
    }
