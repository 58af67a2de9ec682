"""The run of `python -m diffqkv bench` as text: facts of the machine, a table per case."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

import diffqkv

from ..common.inputs import N_K, N_Q, N_V, D
from ..common.line import DISTURBED, cells
from ..common.report import commit, table
from .cases import CASES, case


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
        "commit": commit(),
        "python": platform.python_version(),
    }


def markdown(facts: dict, records: list[dict]) -> str:
    measured = f", commit {facts['commit']}" if facts["commit"] else ""
    text = [
        f"{facts['date']}, {facts['cpu']} (family {facts['cpu_family']}), {facts['threads']} threads, kernels "
        f"{facts['cpu_isa']}, torch {facts['torch']} with {facts['torch_isa']}, diffqkv {facts['diffqkv']}{measured}. "
        f"One layer, heads {N_Q}/{N_K}/{N_V}, d = {D}, batch 1 where none is named. Ours: median ± half the "
        "interquartile range. Other columns: medians of the ratios within each interleaved round; under a peer, how "
        "many times as long as ours it takes. "
        f"In brackets the target. A line is disturbed, and not judged, if more than {DISTURBED:.0%} of the CPUs went "
        "to other processes meanwhile."
    ]
    for name in CASES:
        if rows := [cells(record) for record in records if record["case"] == name]:
            text += ["", f"**{name}**: {case(name).TITLE}.", "", *table(rows)]
    return "\n".join(text) + "\n"
