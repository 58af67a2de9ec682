"""A line of a benchmark: checked, timed, compared with its limit, its peers and its targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .inputs import dtype_name
from .targets import OF_LIMIT, OURS, OVER_TWIN, OWN_TWIN, RATE, Target, bounds
from .timing import Calls, Elsewhere, Timer, interleaved

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
TRAINING_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DISTURBED = 0.05  # the share of the CPUs that went elsewhere: such a line is shown and not judged
MEASURED = ("ms", "spread_ms", "cpu_elsewhere", "rate", "limit", "ratios", "targets", "notes", "figures")
_LIMIT = "limit"


class Limit(NamedTuple):
    """What the machine does at best. It runs beside the line, or its rate is known."""

    name: str
    unit: str  # the rate's: FLOP/s or B/s
    work: float = 0.0  # FLOPs or bytes of a call
    run: Callable[[], object] | None = None
    per_second: float = 0.0


class Contenders(NamedTuple):
    """What a line measures: ours, what it is compared with, and how wrong ours is."""

    error: float  # by `accuracy`
    ours: Calls
    peers: dict[str, Calls]  # OWN_TWIN is our own kernel on the twin
    limit: Limit | None = None
    work: float = 0.0  # FLOPs or bytes of one of our calls, in the unit of the limit
    tolerance: float | None = None  # the largest error that is right; by default TOLERANCE
    notes: Iterable[str] = ()
    # More columns, from the record: each has the figures of ours and of a peer.
    figures: Callable[[dict], dict[str, dict[str, float]]] | None = None
    rounds: int = 7  # at least


def measure(
    case: str, size: NamedTuple, dtype: torch.dtype, seconds: float, who: Contenders, timer: Timer,
    targets: Iterable[Target],
) -> dict:  # fmt: skip
    """Times all contenders in one interleaved run of about `seconds`; nothing is timed if ours is wrong.

    Returns:
        The record of the line, for JSON: the case, the fields of the size and its text, the dtype, and as MEASURED the
        results, None if ours is wrong. A ratio says how many times as long as ours a peer takes, in the median of the
        rounds.
    """
    error, ours, peers, limit, work, tolerance, notes, figures, rounds = who
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    record = {"case": case, "size": str(size), **size._asdict(), "dtype": dtype_name(dtype)}
    record |= {"error": error, "tolerance": tolerance, "correct": error <= tolerance} | dict.fromkeys(MEASURED)
    if not record["correct"]:
        return record

    # The limit stands right beside ours in a round: see Timing.over.
    contenders = ({_LIMIT: [limit.run]} if limit and limit.run else {}) | {OURS: ours} | peers
    elsewhere = Elsewhere()
    times, without = interleaved(timer, contenders, seconds, rounds, optional=peers)
    record["cpu_elsewhere"] = elsewhere.share() if timer.disturbed_by_others else 0.0
    record["ms"] = {name: time.median * 1e3 for name, time in times.items()}
    record["spread_ms"] = {name: time.spread * 1e3 for name, time in times.items()}
    record["notes"] = [*notes, *(f"{peer}: {why}" for peer, why in without.items())]

    measured = {OURS: times[OURS].median}
    ratios = record["ratios"] = {}
    if limit:
        measured[RATE] = work / times[OURS].median
        if limit.run:
            most = limit.work / times[_LIMIT].median
            ratios[OF_LIMIT] = times[_LIMIT].over(times[OURS]) * work / limit.work
        else:
            most = limit.per_second
            ratios[OF_LIMIT] = measured[RATE] / most
        record["rate"] = {"per_second": measured[RATE], "unit": limit.unit}
        record["limit"] = {"name": limit.name, "per_second": most, "unit": limit.unit}
    for peer in (peer for peer in peers if peer in times):
        if peer == OWN_TWIN:
            ratios[OVER_TWIN] = times[OURS].over(times[peer])
        else:
            ratios[peer] = times[peer].over(times[OURS])

    measured |= ratios
    disturbed = record["cpu_elsewhere"] > DISTURBED
    record["targets"] = {
        column: bound._asdict() | {"reached": None if disturbed else bound.reached_by(measured[column])}
        for column, bound in bounds(targets, record).items()
        if column in measured
    }
    record["figures"] = figures(record) if figures else {}
    return record


def cells(record: dict) -> dict[str, str]:
    """The line as texts by column of its table."""
    shown = {"size": record["size"], "dtype": record["dtype"]}
    if not record["correct"]:
        wrong = f"wrong result: error {record['error']:.1e}, want at most {record['tolerance']:.0e}"
        return shown | {OURS: wrong}
    seconds = record["ms"][OURS] / 1e3
    disturbed = ", disturbed" if record["cpu_elsewhere"] > DISTURBED else ""
    shown[OURS] = duration(seconds, record["spread_ms"][OURS] / 1e3) + disturbed
    limit = record["limit"]
    if limit:
        shown[RATE] = _rate(record["rate"]["per_second"], limit["unit"])
    for column, ratio in record["ratios"].items():
        shown[column] = f"{ratio:.2f}"
        if column == OF_LIMIT:
            shown[column] = f"{ratio:.1%} of {limit['name']}, {_rate(limit['per_second'], limit['unit'])}"
    for column, target in record["targets"].items():
        shown[column] += f" ({verdict(column, target, record)})"
    for column, figures in record["figures"].items():
        ours, theirs = (f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" for x in figures.values())
        shown[column] = f"{ours} ({theirs})"
    if record["notes"]:
        shown["notes"] = "; ".join(record["notes"])
    return shown


def verdict(column: str, target: dict, record: dict) -> str:
    """A target of a record and whether it was reached, as text."""
    value, source = target["value"], target["source"] and f", {target['source']}"
    if column == RATE:
        text = _rate(value, record["rate"]["unit"])
    else:
        text = duration(value) if column == OURS else f"{value:.0%}" if column == OF_LIMIT else f"{value:g}"
    return f"{target['sign']} {text}{source}" + {True: ": reached", False: ": missed", None: ""}[target["reached"]]


def duration(seconds: float, spread: float | None = None) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    decimals = _decimals(seconds * scale)
    spread_text = "" if spread is None else f" ± {spread * scale:.{decimals}f}"
    return f"{seconds * scale:.{decimals}f}{spread_text} {unit}"


def _rate(per_second: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if per_second >= 1e12 else (1e9, "G")
    return f"{per_second / scale:.{_decimals(per_second / scale)}f} {prefix}{unit}"


def _decimals(x: float) -> int:
    """The decimals of three digits."""
    return 2 if x < 10 else 1 if x < 100 else 0
