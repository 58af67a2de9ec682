"""The kernel under compute-sanitizer, on a few cases of the grid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch

from .cases import grid, make_call
from .context import Context

_EVERY = 7  # no divisor of the grid's inner loops, so that every axis is met
_LIMIT = 100  # seconds
_DONE = "all cases launched"


def sanitizer(context: Context) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        context.result |= {"status": "skipped", "reason": "compute-sanitizer not found", "tool_missing": True}
        return
    child = "import sys; from device_stages.sanitizer import run_cases; run_cases(sys.argv[1])"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99"]
    command += [sys.executable, "-c", child, str(context.library)]
    # torch's allocator hands out parts of large blocks, inside which no access is out of bounds.
    variables = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    context.result |= {"tool": "memcheck", "cases": len(list(islice(grid(True), 0, None, _EVERY)))}
    context.save()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    run = subprocess.Popen(command, env=variables, start_new_session=True, **pipe)
    try:
        output, _ = run.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the tool and the process under it, which would go on using the device
        context.result |= {"status": "timeout", "reason": f"memcheck: not finished within {_LIMIT} s"}
        return
    context.result["output_tail"] = output[-2000:]
    if "Device not supported" in output:
        reason = "compute-sanitizer does not support this device"
        context.result |= {"status": "skipped", "reason": reason, "tool_missing": True}
    elif run.returncode != 0 or "ERROR SUMMARY: 0 errors" not in output or _DONE not in output:
        context.fail(f"memcheck: exit status {run.returncode}: {output[-500:]}")


def run_cases(library: str) -> None:
    """What runs under the tool."""
    context = Context(Path(library), "cuda", lambda result: None)
    op = context.load_op()
    for seed, case in enumerate(islice(grid(True), 0, None, _EVERY)):
        make_call(case, seed, context.device).run(op)
    torch.cuda.synchronize()
    print(_DONE)
