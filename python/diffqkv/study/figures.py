"""The figures of a study, in the paper's arrangement (Figures 2 to 6), and the cost model over the measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .costs import Line
from .results import NUMBERS, pairs, rows, tokens

TITLES = {
    "augmented_q": "augmented Q",
    "kv_cache": "KV cache",
    "attention": "attention computation",
    "total": "total of KV cache, attention and augmented Q",
}
_COLORS = ("tab:orange", "tab:blue")  # of a system, and of what it is compared with
_STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "figure.dpi": 110, "font.size": 9}


def draw(results: dict[str, Any], size: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what a study has of one dtype and batch; returns the files, PNG and SVG of each figure."""
    drawn = []
    with plt.rc_context(_STYLE):
        for pair in pairs(results):
            suffix = "" if pair[0] == "sigma" else f"-{pair[0]}"
            figures = {f"figure2{suffix}": _ops(results, size, pair)}
            figures |= {f"figure{NUMBERS[name]}{suffix}": _grid(results, size, pair, name) for name in NUMBERS}
            figures[f"model{suffix}"] = _model(results, size, pair)
            for name, figure in figures.items():
                if figure is not None:
                    drawn += _save(figure, folder / f"{name}-{size['dtype']}-batch{size['batch']}")
    return drawn


def _save(figure: Figure, stem: Path) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        part = file.with_name(file.name + ".part")
        figure.savefig(part, format=file.suffix[1:], bbox_inches="tight")
        part.replace(file)
    plt.close(figure)
    return files


def _color(pair: tuple[str, str], system: str) -> str:
    return _COLORS[pair.index(system)]


def _bars(axes: Axes, pair: tuple[str, str], names: list[str], values: dict[str, list[float]], labels: dict) -> None:
    width = 0.4
    for i, system in enumerate(reversed(pair)):
        places = [x + (i - 0.5) * width for x in range(len(names))]
        axes.bar(places, values[system], width, color=_color(pair, system), label=labels[system]["label"])
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)


def _ops(results: dict[str, Any], size: dict[str, Any], pair: tuple[str, str]) -> Figure | None:
    """Figure 2: time within the ops of attention, and the improvement."""
    by_system = {who: {row["prefix"]: row for row in rows(results, "ops", size, system=who)} for who in pair}
    prefixes = sorted(by_system[pair[0]].keys() & by_system[pair[1]].keys())
    if not prefixes:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.4))
    names = [tokens(prefix) for prefix in prefixes]
    values = {who: [1e3 * by_system[who][p]["attention"]["median"] for p in prefixes] for who in pair}
    _bars(axes, pair, names, values, results["described"])
    axes.set(xlabel="prefix, tokens", ylabel=f"{by_system[pair[0]][prefixes[0]]['output']} tokens, ms", yscale="log")
    axes.legend(loc="upper left")
    line = axes.twinx()
    line.plot(range(len(names)), [100 * by_system[pair[0]][p]["improvement"] for p in prefixes], "k.--", linewidth=1)
    line.set(ylabel="improvement, %", ylim=(-5, 50))
    line.grid(visible=False)
    axes.set_title(f"Time within the ops of attention, {_about(results, size)}")
    return figure


def _about(results: dict[str, Any], size: dict[str, Any]) -> str:
    return f"{results['config']['num_hidden_layers']} layers, {size['dtype']}, batch {size['batch']}"


def _grid(results: dict[str, Any], size: dict[str, Any], pair: tuple[str, str], name: str) -> Figure | None:
    """Figures 3 to 6: seconds by prefix for each output; the differences, absolute and relative."""
    sums = {
        who: {(row["prefix"], row["output"]): row for row in rows(results, "ceet", size, system=who)} for who in pair
    }
    points = sums[pair[0]].keys() & sums[pair[1]].keys()
    outputs = sorted({output for _, output in points})
    if not outputs or not any(sums[pair[1]][point]["seconds"][name] > 0 for point in points):
        return None
    columns = 4
    lines = -(-(len(outputs) + 2) // columns)
    figure, all_axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.7 * lines), layout="constrained")
    panels = iter(all_axes.flat)
    for letter, output in zip("abcdefghij", outputs, strict=False):
        axes = next(panels)
        prefixes = sorted(prefix for prefix, o in points if o == output)
        values = {who: [sums[who][prefix, output]["seconds"][name] for prefix in prefixes] for who in pair}
        _bars(axes, pair, [tokens(prefix) for prefix in prefixes], values, results["described"])
        axes.set(title=f"({letter}) output {tokens(output)}", xlabel="prefix", ylabel="s")
    handles, labels = all_axes.flat[0].get_legend_handles_labels()
    absolute, relative = next(panels), next(panels)
    for prefix in sorted({prefix for prefix, _ in points}):
        mine = sorted(o for p, o in points if p == prefix)
        both = [[sums[who][prefix, o]["seconds"][name] for o in mine] for who in pair]
        x = range(len(outputs) - len(mine), len(outputs)) if mine[-1] == outputs[-1] else range(len(mine))
        label = f"prefix {tokens(prefix)}"
        absolute.plot(x, [b - a for a, b in zip(*both, strict=True)], ".-", label=label)
        relative.plot(x, [100 * (1 - a / b) for a, b in zip(*both, strict=True)], ".-", label=label)
    for axes, what in ((absolute, "improvement, s"), (relative, "improvement, %")):
        axes.axhline(0.0, color="gray", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(outputs)), [tokens(output) for output in outputs])
        axes.set(title=what, xlabel="output")
    relative.legend(fontsize=7)
    for axes in panels:
        axes.set_axis_off()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.suptitle(f"{TITLES[name]}: {_about(results, size)}", x=0.01, ha="left")
    return figure


def _model(results: dict[str, Any], size: dict[str, Any], pair: tuple[str, str]) -> Figure | None:
    """What a step costs by its context: measured, by eq. 14 fitted, and by bytes at the rate of reading."""
    found = {who: rows(results, "steps", size, system=who) for who in pair}
    fitted = {row["systems"][0]: row for row in rows(results, "lines", size) if len(row["systems"]) == 1}
    if not all(found.values()) or not fitted:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lowest: list[float] = []
    for who in pair:
        color, label = _color(pair, who), results["described"][who]["label"]
        contexts = [row["context"] for row in found[who]]
        elements = [size["batch"] * results["described"][who]["elements"] * context for context in contexts]
        line = Line(fitted[who]["alpha"], fitted[who]["beta"])
        attention = [1e3 * (row["attention"]["median"] + row["kv_cache"]["median"]) for row in found[who]]
        panels[0].plot(contexts, attention, "o", color=color, markersize=4, label=label)
        panels[0].plot(contexts, [1e3 * line(x) for x in elements], "-", color=color, linewidth=1)
        panels[0].plot(contexts, [1e3 * fitted[who]["alpha_of_reading"] * x for x in elements], ":", color=color)
        lowest.append(min(attention))
        total = [1e3 * row["total"]["median"] for row in found[who]]
        spread = [1e3 * row["total"]["spread"] for row in found[who]]
        panels[1].errorbar(contexts, total, yerr=spread, fmt="o-", color=color, markersize=4, linewidth=1, label=label)
    for row in rows(results, "crossovers", size, system=pair[0]):
        for name, style in (("measured", "-"), ("by_bytes", ":")):
            if row[name]:
                label = f"equal, {name.replace('_', ' ')}"
                panels[1].axvline(row[name], color="gray", linestyle=style, linewidth=1, label=label)
    panels[0].set(title="attention and KV cache; lines: eq. 14, dotted: bytes alone", xlabel="context", ylabel="ms")
    panels[0].set_ylim(bottom=min(lowest) / 2)
    panels[1].set(title="total, with augmented Q", xlabel="context", ylabel="ms")
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(contexts, [tokens(context) for context in contexts], fontsize=7)
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.suptitle(f"A step of {_about(results, size)}", x=0.01, ha="left")
    return figure


def advice(
    contexts: list[int],
    ours: list[float],
    theirs: list[float],
    labels: tuple[str, str],
    equal: float | None,
    path: Path,
) -> list[Path]:
    """The plot of an adviser: the cost of a step by its context, and the context at which both are equal."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for seconds, label, color in zip((ours, theirs), labels, _COLORS, strict=True):
            axes.plot(contexts, [1e3 * x for x in seconds], "-", color=color, label=label)
        if equal:
            axes.axvline(equal, color="gray", linestyle="--", linewidth=1, label=f"equal at {equal:,.0f} tokens")
        axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="total of a step, all layers, ms")
        axes.legend(fontsize=8)
        return _save(figure, path)
