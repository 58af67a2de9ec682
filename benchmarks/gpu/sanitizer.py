"""An op under compute-sanitizer, on small cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from .calls import TESTED_OPS
from .calls.caches import CachedCase
from .context import Context

# Racecheck is exact for kernels whose copies are cp.async; of bulk copies it reports hazards that are none.
_CASES = {"memcheck": 12, "racecheck": 5}
_DONE = "all cases launched"


def _run(context: Context, tool: str, name: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        context.result |= {"status": "skipped", "reason": "compute-sanitizer not found", "tool_missing": True}
        return
    child = f"from gpu.sanitizer import run_cases; run_cases({name!r}, {_CASES[tool]}, {tool == 'racecheck'})"
    command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", child]
    # torch's allocator hands out parts of large blocks, inside which no access is out of bounds.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    context.result["cases"] = _CASES[tool]
    context.save()
    # In this process's group, all of which is ended where the time is up.
    run = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
    output = run.stdout + run.stderr
    context.result["output_tail"] = output[-2000:]
    if "Device not supported" in output:
        reason = "compute-sanitizer does not support this device"
        context.result |= {"status": "skipped", "reason": reason, "tool_missing": True}
    elif run.returncode != 0 or _DONE not in output:
        context.fail(f"{tool}: exit status {run.returncode}: {output[-800:]}")


def memcheck(context: Context, name: str) -> None:
    _run(context, "memcheck", name)


def racecheck(context: Context, name: str) -> None:
    _run(context, "racecheck", name)


def run_cases(name: str, count: int, portable: bool) -> None:
    """What runs under the tool: the cases of a dry run, which are small."""
    context = Context("cuda", lambda result: None)
    cases = TESTED_OPS[name].cases(context.dtypes(name), False)
    for seed, case in enumerate(islice(cases, count)):
        if portable and isinstance(case, CachedCase):
            case = replace(case, gap=3)  # rows that no bulk copy can take
        TESTED_OPS[name].make(case, seed, context.device).run(context.op(name))
    torch.cuda.synchronize()
    print(_DONE)
