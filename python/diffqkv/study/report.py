"""The report of a study, in Markdown: what was measured on which machine, tables, figures, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..benchmarks.common.line import DISTURBED
from ..benchmarks.common.report import table
from .results import NUMBERS, RANGES, pairs, rows, tokens

# Table 8: KET improvement of attention by prefix, on an H100.
PAPER_KET = {2048: 0.0139, 4096: 0.1802, 16384: 0.2335, 32768: 0.2531}
# Section 3.3.2: CEET improvements by (prefix, output), on an H100.
PAPER_CEET = {
    "kv_cache": {(65536, 65536): 0.3657},
    "attention": {(65536, 65536): 0.154},
    "total": {(0, 2048): -0.4011, (65536, 65536): 0.3336},
}


def text(results: dict[str, Any], drawn: list[Path], why_no_figures: str | None) -> str:
    """The whole report; figures are named relative to its folder."""
    config, machine, versions = results["config"], results["machine"], results["versions"]
    heads = "/".join(str(config[f"num_{side}_heads"]) for side in ("attention", "key", "value"))
    releases = ", ".join(f"{name} {release}" for name, release in versions.items() if release)
    lines = [
        "# Efficiency study",
        "",
        f"Heads {heads}, K {config['k_head_dim']} and V {config['head_dim']} wide, augmented Q {config['q_aug_dim']}, "
        f"hidden size {config['hidden_size']}, FFN {config['intermediate_size']}. Measured: {results['layers']} of "
        f"{config['num_hidden_layers']} layers, with random weights; seconds are those of all layers, by this share.",
        "",
        f"{results['device']}, {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, kernels "
        f"{machine['cpu_isa']}; {releases}. {results['samples']} samples. {_noise(results)}",
        "",
        "Total: KV cache, attention and augmented Q, as in section 3.3.2 of the paper; that of STD is without the "
        "augmented Q that is attached to it. An improvement is the share by which a system takes less than the one it "
        "is compared with. The prompt is not a part of any figure: prefixes are in the cache when the steps begin.",
    ]
    if results["left_out"]:
        lines += ["", "Left out, for lack of time:", "", *(f"- {sentence}" for sentence in results["left_out"])]
    lines += ["", "| system | what it is | compared with | numbers per token and layer |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {about['label']} | {about['baseline'] or '–'} | {about['elements']:,} |"
        for name, about in results["described"].items()
    ]
    sizes = [{"dtype": dtype, "batch": batch} for dtype in results["dtypes"] for batch in results["batches"]]
    for size in sizes:
        lines += ["", f"## {size['dtype']}, batch {size['batch']}"]
        lines += _sections(results, size)
        mine = [file for file in drawn if file.stem.endswith(f"{size['dtype']}-batch{size['batch']}")]
        lines += [line for file in mine if file.suffix == ".png" for line in ("", f"![{file.stem}]({file.name})")]
    if why_no_figures:
        lines += ["", f"No figures: {why_no_figures}"]
    return "\n".join(lines) + "\n"


def _noise(results: dict[str, Any]) -> str:
    read = results["read_bytes_per_s"]
    found = "" if read is None else f"Memory was read at {read['median'] / 1e9:.1f} ± {read['spread'] / 1e9:.1f} GB/s."
    if results["cpu_elsewhere"] > DISTURBED:
        found += f" Other processes took up to {results['cpu_elsewhere']:.0%} of the CPUs: expect noise."
    return found


def _sections(results: dict[str, Any], size: dict[str, Any]) -> list[str]:
    sections = [
        ("A step, by context (ms, median ± half the interquartile range)", _steps(results, size)),
        ("Elapsed time of whole generations (CEET): improvement", _ceet(results, size)),
        ("Time within ops (KET), as in Table 8", ket_rows(results, size)),
        ("The sums of steps beside real generation", _validation(results, size)),
        ("Eq. 14: attention and KV cache as alpha * elements + beta", _lines(results, size)),
        ("From which context on a step costs no more", _crossovers(results, size)),
        ("Does augmented Q cost the same in both? (Figure 3's claim)", _tests(results, size)),
    ]
    return [line for title, body in sections if body for line in ("", f"### {title}", "", *table(body))]


def _steps(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"system": row["system"], "context": tokens(row["context"]), "rounds": str(row["samples"])}
        | {name: f"{1e3 * row[name]['median']:.3g} ± {1e3 * row[name]['spread']:.2g}" for name in RANGES}
        for row in rows(results, "steps", size)
    ]


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{x:+.1%}"


def _ceet(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for pair in pairs(results):
        for row in rows(results, "ceet", size, system=pair[0]):
            if "improvement" not in row:
                continue
            shown = {
                "system": pair[0],
                "over": pair[1],
                "prefix": tokens(row["prefix"]),
                "output": tokens(row["output"]),
            }
            shown |= {name: _percent(row["improvement"].get(name)) for name in RANGES}
            point = row["prefix"], row["output"]
            paper = [f"{name} {_percent(known[point])}" for name, known in PAPER_CEET.items() if point in known]
            found.append(
                shown | {"total, s": f"{row['seconds']['total']:.4g}", "the paper's (H100)": ", ".join(paper) or "–"}
            )
    return found


def ket_rows(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    """Table 8: one column where the paper has Split and Combine, for these ops compute both in one."""
    found = []
    for pair in pairs(results):
        theirs = {row["prefix"]: row for row in rows(results, "ops", size, system=pair[1])}
        for row in rows(results, "ops", size, system=pair[0]):
            if row["prefix"] not in theirs:
                continue
            paper = PAPER_KET.get(row["prefix"]) if pair[0] == "sigma" else None
            found.append(
                {
                    "prefix": tokens(row["prefix"]),
                    "system": pair[0],
                    "over": pair[1],
                    f"its {row['output']} tokens, ms": f"{1e3 * row['attention']['median']:.4g}",
                    "the other's": f"{1e3 * theirs[row['prefix']]['attention']['median']:.4g}",
                    "improvement": _percent(row["improvement"]),
                    "the paper's (H100)": _percent(paper),
                }
            )
    return found


def _validation(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"system": row["system"], "prefix": tokens(row["prefix"]), "output": tokens(row["output"])}
        | {"generated, s": f"{row['generated']['step']:.4g}", "summed, s": f"{row['summed']['step']:.4g}"}
        | {f"error of {name}": _percent(row["error"].get(name)) for name in ("step", "total", "attention")}
        for row in rows(results, "validation", size)
    ]


def _lines(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "system": row["name"],
            "alpha, ps": f"{1e12 * row['alpha']:.3g}",
            "of reading alone, ps": f"{1e12 * row['alpha_of_reading']:.3g}",
            "beta, ms": f"{1e3 * row['beta']:.3g}",
            "error, median": f"{row['median_error']:.1%}",
            "worst": f"{row['worst_error']:.1%}",
        }
        for row in rows(results, "lines", size)
    ]


def _context(x: float | None) -> str:
    return "never" if x is None else f"{x:,.0f}"


def _crossovers(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for row in rows(results, "crossovers", size):
        beyond = f"not up to {row['longest_measured']:,}"
        measured = beyond if row["measured"] is None else _context(row["measured"])
        found.append(
            {"system": row["system"], "over": row["baseline"], "measured": measured}
            | {"by fitted lines": _context(row["fitted"]), "by bytes at the rate of reading": _context(row["by_bytes"])}
        )
    return found


def _tests(results: dict[str, Any], size: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"system": row["system"], "over": row["baseline"], "t": f"{row['t']:.3f}", "p": f"{row['p']:.3f}"}
        | {"pairs of samples": str(row["n"]), "the paper's": "t = -0.214, p = 0.832"}
        for row in rows(results, "tests", size)
    ]


def striking(results: dict[str, Any]) -> str:
    """A few lines for the terminal: improvements at the longest point of the grid, and where totals are equal."""
    lines = []
    for dtype in results["dtypes"]:
        for batch in results["batches"]:
            size = {"dtype": dtype, "batch": batch}
            for pair in pairs(results):
                measured = [row for row in rows(results, "ceet", size, system=pair[0]) if "improvement" in row]
                if not measured:
                    continue
                row = max(measured, key=lambda row: (row["prefix"] + row["output"], row["prefix"]))
                said = ", ".join(f"{name} {_percent(row['improvement'].get(name))}" for name in (*NUMBERS, "step"))
                where = f"prefix {tokens(row['prefix'])}, output {tokens(row['output'])}"
                lines.append(f"{dtype}, batch {batch}, {pair[0]} over {pair[1]}, {where}: {said}")
    return "\n".join(lines)
