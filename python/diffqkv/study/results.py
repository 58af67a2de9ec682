"""What the samples of a study say: medians, sums over a grid, improvements, the cost model beside them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from statistics import median
from typing import Any

from scipy import stats

from ..benchmarks.common.timing import Timing
from .costs import (
    augmented_q_weights,
    cache_elements,
    costs,
    crossover,
    cumulative,
    fit,
    measured_crossover,
    other_weights,
)
from .measure import Size
from .run import Recipe
from .systems import PLAIN, System

RANGES = ("kv_cache", "attention", "augmented_q", "total", "step")
NUMBERS = {"augmented_q": 3, "kv_cache": 4, "attention": 5, "total": 6}  # the paper's figures


def hidden_share(system: System, recipe: Recipe) -> float:
    """The share of the rest of a layer that is augmented Q's, by its weights.

    In a form of `fuse_for_inference` its gate and up projections, less the q_proj that they replace, are a part of a
    product with K and V.
    """
    if system.weights == PLAIN:
        return 0.0
    config = system.config(recipe.config, recipe.layers)
    down = config.num_attention_heads * config.head_dim * (config.q_aug_dim or 0)
    hidden = augmented_q_weights(config, is_folded=True) - down
    return hidden / (other_weights(config) + hidden)


def parts(seconds: dict[str, float], system: System, hidden: float) -> dict[str, float]:
    """The paper's components of a sample, their total as in its section 3.3.2, and the whole step.

    hidden: `hidden_share` of the system.
    """
    augmented = seconds["augmented_q"] + hidden * seconds["layers_rest"]
    total = seconds["kv_cache"] + seconds["attention"] + (augmented if system.counts_augmented_q else 0.0)
    return {
        "kv_cache": seconds["kv_cache"],
        "attention": seconds["attention"],
        "augmented_q": augmented,
        "total": total,
        "step": seconds["step"],
    }


def results(recipe: Recipe, samples: Iterable[dict[str, Any]], left_out: list[str]) -> dict[str, Any]:
    """All numbers of a study, for JSON. Seconds are of all layers of the configuration, by its share of them."""
    samples = list(samples)
    scale = recipe.config.num_hidden_layers / recipe.layers
    systems = {system.name: system for system in recipe.systems}
    hidden = {system.name: hidden_share(system, recipe) for system in recipe.systems}
    read = [s["read_bytes_per_s"] for s in samples if "read_bytes_per_s" in s]
    found: dict[str, Any] = {
        **recipe.identity(),
        "samples": len(samples),
        "left_out": left_out,
        "read_bytes_per_s": _spread(read) if read else None,
        "cpu_elsewhere": max((s["cpu_elsewhere"] for s in samples if "cpu_elsewhere" in s), default=0.0),
        "described": {
            system.name: {
                "label": system.label,
                "baseline": system.baseline,
                "elements": cache_elements(system.config(recipe.config, 1)),
                "weights": system.weights,
            }
            for system in recipe.systems
        },
    }
    tables: dict[str, list] = {
        name: [] for name in ("steps", "ceet", "validation", "ops", "lines", "crossovers", "tests")
    }
    for size in recipe.sizes:
        mine = [s for s in samples if all(s[name] == value for name, value in size.keys.items())]
        curves = _curves(mine, systems, hidden, scale)
        tables["steps"] += [size.keys | row for row in _step_rows(curves)]
        tables["ceet"] += [size.keys | row for row in _ceet_rows(curves, systems, recipe)]
        tables["validation"] += [size.keys | row for row in _validation_rows(mine, curves, systems, hidden, scale)]
        tables["ops"] += [size.keys | row for row in _op_rows(mine, systems, scale)]
        if read:
            rate = median(read)
            tables["lines"] += [size.keys | row for row in _line_rows(curves, systems, recipe, size, rate)]
            tables["crossovers"] += [size.keys | row for row in _crossover_rows(curves, systems, recipe, size, rate)]
        tables["tests"] += [size.keys | row for row in _tests(mine, systems)]
    return found | tables


def pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The systems that were measured and have a baseline, with it."""
    described = results["described"]
    return [(name, about["baseline"]) for name, about in described.items() if about["baseline"] in described]


def rows(results: dict[str, Any], table: str, size: dict[str, Any], **what: object) -> list[dict[str, Any]]:
    """The rows of a table of a dtype, a batch, and whatever else they are asked to have."""
    wanted = size | what
    return [row for row in results[table] if all(row[name] == value for name, value in wanted.items())]


def tokens(number: int) -> str:
    """2048 as "2k"."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


Curves = dict[str, dict[int, dict[str, list[float]]]]  # seconds by system, context and range


def _curves(samples: list[dict], systems: dict[str, System], hidden: dict[str, float], scale: float) -> Curves:
    found: Curves = {}
    for sample in samples:
        if sample["kind"] != "step":
            continue
        by_range = found.setdefault(sample["system"], {}).setdefault(sample["context"], {name: [] for name in RANGES})
        who = sample["system"]
        for name, seconds in parts(sample["seconds"], systems[who], hidden[who]).items():
            by_range[name].append(scale * seconds)
    return {system: dict(sorted(by_context.items())) for system, by_context in found.items()}


def _spread(values: list[float]) -> dict[str, float]:
    timing = Timing(values)
    return {"median": timing.median, "spread": timing.spread if len(values) > 1 else 0.0}


def _step_rows(curves: Curves) -> list[dict]:
    return [
        {"system": system, "context": context, "samples": len(by_range["total"])}
        | {name: _spread(seconds) for name, seconds in by_range.items()}
        for system, by_context in curves.items()
        for context, by_range in by_context.items()
    ]


def _median_curve(curves: Curves, system: str, name: str) -> tuple[list[int], list[float]]:
    by_context = curves[system]
    return list(by_context), [median(by_range[name]) for by_range in by_context.values()]


def _summed(curves: Curves, system: str, prefix: int, output: int) -> dict[str, float] | None:
    contexts = list(curves[system])
    if not contexts or prefix + output > contexts[-1]:
        return None
    return {name: cumulative(*_median_curve(curves, system, name), prefix, output) for name in RANGES}


def _ceet_rows(curves: Curves, systems: dict[str, System], recipe: Recipe) -> list[dict]:
    rows = []
    for prefix, output in product(recipe.prefixes, recipe.outputs):
        sums = {system: _summed(curves, system, prefix, output) for system in curves}
        for system, seconds in sums.items():
            if seconds is None:
                continue
            row = {"system": system, "prefix": prefix, "output": output, "seconds": seconds}
            baseline = sums.get(systems[system].baseline)
            if baseline:
                row["improvement"] = {name: 1 - seconds[name] / baseline[name] for name in RANGES if baseline[name] > 0}
            rows.append(row)
    return rows


def _validation_rows(
    samples: list[dict], curves: Curves, systems: dict[str, System], hidden: dict[str, float], scale: float
) -> list[dict]:
    rows = []
    for sample in samples:
        if sample["kind"] != "generate":
            continue
        summed = _summed(curves, sample["system"], sample["prefix"], sample["output"])
        if summed is None:
            continue
        who = sample["system"]
        generated = {n: scale * x for n, x in parts(sample["seconds"], systems[who], hidden[who]).items()}
        errors = {name: summed[name] / generated[name] - 1 for name in RANGES if generated[name] > 0}
        what = {name: sample[name] for name in ("system", "prefix", "output")}
        rows.append({**what, "generated": generated, "summed": summed, "error": errors})
    return rows


def _op_rows(samples: list[dict], systems: dict[str, System], scale: float) -> list[dict]:
    seconds: dict[tuple[int, str], list[float]] = {}
    outputs = {}
    for sample in samples:
        if sample["kind"] == "ops":
            key = sample["prefix"], sample["system"]
            seconds.setdefault(key, []).append(scale * sum(sample["seconds"].values()))
            outputs[key] = sample["output"], sorted(sample["seconds"])
    rows = []
    for (prefix, system), taken in sorted(seconds.items()):
        output, ops = outputs[prefix, system]
        row = {"system": system, "prefix": prefix, "output": output, "ops": ops, "attention": _spread(taken)}
        baseline = seconds.get((prefix, systems[system].baseline))
        if baseline:
            row["improvement"] = 1 - median(a / b for a, b in zip(taken, baseline, strict=False))  # within a round
        rows.append(row)
    return rows


def _is_own(system: System) -> bool:
    return not system.is_stock and not system.changes.get("selective_v_top_k")


def _line_rows(curves: Curves, systems: dict[str, System], recipe: Recipe, size: Size, rate: float) -> list[dict]:
    """Eq. 14 for attention and the cache of each system, and for the pair that reads all with the same kernels."""
    points = {
        system: [
            (size.batch * context * cache_elements(systems[system].config(recipe.config, 1)), a + k)
            for context, a, k in zip(
                curves[system],
                _median_curve(curves, system, "attention")[1],
                _median_curve(curves, system, "kv_cache")[1],
                strict=True,
            )
        ]
        for system in curves
    }
    pair = [name for name in ("sigma", "std") if name in points]
    named = {name: [name] for name in points} | ({" and ".join(pair): pair} if len(pair) == 2 else {})
    per_element = size.dtype.itemsize * recipe.config.num_hidden_layers / rate
    rows = []
    for name, members in named.items():
        x, seconds = zip(*(point for member in members for point in points[member]), strict=True)
        line = fit(x, seconds)
        errors = [abs(line(a) / b - 1) for a, b in zip(x, seconds, strict=True)]
        rows.append(
            {
                "systems": members,
                "name": name,
                "alpha": line.slope,
                "beta": line.offset,
                "alpha_of_reading": per_element,
                "median_error": median(errors),
                "worst_error": max(errors),
            }
        )
    return rows


def _crossover_rows(curves: Curves, systems: dict[str, System], recipe: Recipe, size: Size, rate: float) -> list[dict]:
    """The contexts from which a system's step costs no more than its baseline's: measured, fitted, by bytes alone."""
    rows = []
    for name, system in systems.items():
        if system.baseline not in curves or name not in curves or not _is_own(system):
            continue
        ours, theirs = (_median_curve(curves, who, "total") for who in (name, system.baseline))
        shared = [c for c in ours[0] if c in theirs[0]]
        mine, other = ([y for c, y in zip(*side, strict=True) if c in shared] for side in (ours, theirs))
        models = [
            costs(systems[who].config(recipe.config, 1), system.weights, size.dtype.itemsize, size.batch, rate)
            for who in (name, system.baseline)
        ]
        more = models[0].augmented_q if system.counts_augmented_q else 0.0
        saved = models[1].per_token - models[0].per_token
        rows.append(
            {
                "system": name,
                "baseline": system.baseline,
                "measured": measured_crossover(shared, mine, other),
                "fitted": crossover(fit(shared, mine), fit(shared, other)),
                "by_bytes": more / saved if saved > 0 else None,
                "longest_measured": shared[-1],
            }
        )
    return rows


def _tests(samples: list[dict], systems: dict[str, System]) -> list[dict]:
    """Whether augmented Q, which both have, costs the same: a t-test of relative differences, as for Figure 3."""
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in systems}  # by context, a number for each round
    for sample in samples:
        if sample["kind"] == "step":
            rounds = seconds[sample["system"]].setdefault(sample["context"], [])
            rounds.append(sample["seconds"]["augmented_q"])
    rows = []
    for name, system in systems.items():
        theirs = seconds.get(system.baseline, {})
        differences = [
            1 - a / b
            for context, mine in seconds[name].items()
            for a, b in zip(mine, theirs.get(context, ()), strict=False)
            if b > 0
        ]
        if len(differences) < 3:
            continue
        test = stats.ttest_1samp(differences, 0.0)
        row = {"system": name, "baseline": system.baseline, "n": len(differences)}
        rows.append(row | {"t": float(test.statistic), "p": float(test.pvalue)})
    return rows
