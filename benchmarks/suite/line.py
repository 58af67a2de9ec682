"""A line of a table: checked, timed, compared with its limit, its peers and its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layer import Size
from .limits import Limit
from .targets import OF_LIMIT, OVER_TWIN, bounds
from .timing import Elsewhere, Timing, interleaved

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DISTURBED = 0.05  # of the CPUs spent elsewhere: such a line is shown and not judged
_VERDICTS = {True: ": reached", False: ": missed", None: ""}
OURS, _LIMIT, _TWIN = "ours", "limit", "own GQA-16"


class Line(NamedTuple):
    case: str
    correct: bool
    cells: dict[str, str]  # by column
    record: dict  # the same as numbers, for JSON


def difference(got: Tensor, want: Tensor) -> float:
    """The largest absolute error where |want| < 1, relative error elsewhere; NaN if there is one."""
    want = want.double()
    return ((got.double() - want).abs() / want.abs().clamp_min(1)).max().item()


def measure(
    case: str,
    size: Size,
    dtype: torch.dtype,
    seconds: float,
    *,
    error: float,
    tolerance: float | None = None,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    twin: Callable[[], object] | None = None,
    limit: Limit | None = None,
    work: float = 0.0,
) -> Line:
    """Times all contenders in one interleaved run; nothing is timed if `error`, a `difference`, is too large.

    Args:
        tolerance: of the error; TOLERANCE of the dtype by default.
        ours, peers, twin: a call each; twin is our own kernel on the GQA-16 twin.
        work: FLOPs or bytes of one of our calls, in the unit of the limit.
    """
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    correct = error <= tolerance
    cells = {"tokens": str(size), "dtype": name}
    record = {"case": case, **size._asdict(), "dtype": name, "error": error, "correct": correct}
    record |= dict.fromkeys(("ms", "spread_ms", "cpu_elsewhere", "rate", "limit", "ratios", "targets"))
    if not correct:
        cells[OURS] = f"wrong result: error {error:.1e}, want at most {tolerance:.0e}"
        return Line(case, False, cells, record)

    # The limit stands right beside ours in a round: see Timing.over.
    contenders = ({_LIMIT: limit.run} if limit else {}) | {OURS: ours} | peers | ({_TWIN: twin} if twin else {})
    elsewhere = Elsewhere()
    times = interleaved(contenders, seconds)
    record["cpu_elsewhere"] = elsewhere.share()
    disturbed = record["cpu_elsewhere"] > DISTURBED
    cells[OURS] = _duration(times[OURS]) + (", disturbed" if disturbed else "")
    record["ms"] = {who: time.median * 1e3 for who, time in times.items()}
    record["spread_ms"] = {who: time.spread * 1e3 for who, time in times.items()}

    ratios = {peer: times[peer].over(times[OURS]) for peer in peers}
    shown = {column: f"{ratio:.2f}" for column, ratio in ratios.items()}
    targets = bounds(case, name, size.tokens)
    if limit:
        rate, most = work / times[OURS].median, limit.work / times[_LIMIT].median
        ratios = {OF_LIMIT: times[_LIMIT].over(times[OURS]) * work / limit.work} | ratios
        shown = {OF_LIMIT: f"{ratios[OF_LIMIT]:.1%} of {limit.name}, {_rate(most, limit.unit)}"} | shown
        targets = bounds(case, name, size.tokens, limit.name, most)
        cells["rate"] = _rate(rate, limit.unit)
        record["rate"] = {"per_second": rate, "unit": limit.unit}
        record["limit"] = {"name": limit.name, "per_second": most, "unit": limit.unit}
    if twin:
        ratios[OVER_TWIN] = times[OURS].over(times[_TWIN])
        shown[OVER_TWIN] = f"{ratios[OVER_TWIN]:.2f}"
    record["ratios"], record["targets"] = ratios, {}
    for column, bound in targets.items():
        reached = None if disturbed else bound.reached_by(ratios[column])
        value = f"{bound.value:.0%}" if column == OF_LIMIT else f"{bound.value:g}"
        shown[column] += f" ({bound.sign} {value}{_VERDICTS[reached]})"
        record["targets"][column] = {**bound._asdict(), "reached": reached}
    return Line(case, True, cells | shown, record)


def _duration(time: Timing) -> str:
    scale, unit = (1e3, "ms") if time.median >= 1e-3 else (1e6, "µs")
    decimals = _decimals(time.median * scale)
    return f"{time.median * scale:.{decimals}f} ± {time.spread * scale:.{decimals}f} {unit}"


def _rate(per_second: float, unit: str) -> str:
    billions = per_second / 1e9
    return f"{billions:.{_decimals(billions)}f} G{unit}"


def _decimals(x: float) -> int:
    """For three digits."""
    return 2 if x < 10 else 1 if x < 100 else 0
