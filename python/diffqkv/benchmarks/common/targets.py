"""What a target is, and the columns that targets are set for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

OURS, RATE, OF_LIMIT = "ours", "rate", "of limit"
SDPA_REPEATED, SDPA_TWIN, MATMUL = "SDPA, K repeated", "SDPA, GQA-16", "torch matmul"
OWN_DENSE, OWN_MHA = "own dense", "own MHA"
OWN_TWIN = "own GQA-16"  # the same kernel on the twin: as many K heads as V heads
OVER_TWIN = "Sigma / own GQA-16"  # the time of ours over that of the twin
SDPA_MODEL = "through SDPA"
LLAMA, LLAMA_CPP = "Llama, GQA-16", "llama.cpp"
NO_AUGMENTED_Q, UNPACKED = "no augmented Q", "unpacked"

_HOLDS = {"≥": operator.ge, "≤": operator.le, ">": operator.gt}


class Bound(NamedTuple):
    sign: str
    value: float
    source: str = ""  # whose record it is, if not ours

    def reached_by(self, measured: float) -> bool:
        return _HOLDS[self.sign](measured, self.value)


class Target(NamedTuple):
    """What the lines of a case should reach in a column: seconds (OURS), FLOP/s or B/s (RATE), or a quotient."""

    case: str
    column: str
    sign: str
    float32: float | None
    bfloat16: float | None
    tokens: range = range(1 << 40)
    where: Callable[[dict], bool] = lambda record: True
    source: str = ""


def bounds(targets: Iterable[Target], record: dict) -> dict[str, Bound]:
    """The targets of a line by column. record: see `line.measure`."""
    return {
        target.column: Bound(target.sign, value, target.source)
        for target in targets
        if target.case == record["case"]
        and (value := getattr(target, record["dtype"])) is not None
        and record.get("tokens", 0) in target.tokens
        and target.where(record)
    }
