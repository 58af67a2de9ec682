"""The run as text: machine facts, Markdown tables, files."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import diffqkv

from .cases import CASES, case
from .layer import N_K, N_Q, N_V, D
from .line import DISTURBED, Line


def _commit() -> str | None:
    """The commit of this file, where it lies in a checkout of its own project."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", file.parent, *arguments], capture_output=True, text=True)

    try:
        tracked = git("ls-files", "--error-unmatch", file.name).returncode == 0
        return git("describe", "--always", "--dirty", "--exclude=*").stdout.strip() or None if tracked else None
    except OSError:  # no git
        return None


def machine() -> dict:
    cpuinfo = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpuinfo.get("model name", platform.machine()),
        "cpu_family": cpuinfo.get("cpu family"),
        "cpu_isa": diffqkv.config()["cpu_isa"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "diffqkv": diffqkv.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
    }


def _table(lines: list[Line]) -> list[str]:
    columns = list(dict.fromkeys(column for line in lines for column in line.cells))
    rows = [columns] + [[line.cells.get(column, "") for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]


def markdown(facts: dict, lines: list[Line]) -> str:
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    text = [
        f"{facts['date']}, {facts['cpu']} (family {facts['cpu_family']}), {facts['threads']} threads, kernels "
        f"{facts['cpu_isa']}, torch {facts['torch']} with {facts['torch_isa']}, diffqkv {facts['diffqkv']}{commit}. "
        f"One layer, heads {N_Q}/{N_K}/{N_V}, d = {D}, batch 1 unless told. Ours: median ± half the interquartile "
        "range. Other columns: medians of the ratios within each interleaved round; under a peer, how many times as "
        "long as ours it takes. "
        f"In brackets the target. A line is disturbed, and not judged, if more than {DISTURBED:.0%} of the CPUs went "
        "to other processes meanwhile."
    ]
    for name in CASES:
        if rows := [line for line in lines if line.case == name]:
            text += ["", f"**{name}**: {case(name).TITLE}.", "", *_table(rows)]
    return "\n".join(text) + "\n"


def write(path: Path, text: str) -> None:
    """At once or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
