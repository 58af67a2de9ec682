"""Checks and measures the CUDA kernels on a GPU at hand, in one command and less than ten minutes.

    python benchmarks/device_check.py --library build/libdiffqkv.so --out report/

Needs torch >= 2.11 and a libdiffqkv.so, which may have been built elsewhere. Stages run in the order of their
importance, each in a process of its own with a time limit: neither a crash nor a hang takes the others along, and the
report (device_check.json, device_check.md) is rewritten after each. `--device cpu` is a dry run of the correctness
stages through the CPU kernels.

Exit status: 0 correct, 1 a correctness stage did not pass, 2 no CUDA device.

device_check.json:
    format         1
    passed         whether every correctness stage that ran passed; false until all have finished
    environment    date, GPU, driver, torch, library (path, sha256), commit
    stages         by name: status (passed, failed, error, timeout, skipped), seconds, reason (of anything but passed),
                   failures (list of texts, correctness stages), and the stage's own figures:
      correctness    cases, exact: K rotated to the very bits of plain torch, rounded: not so, but within one rounding
      graph          replays compared with eager calls
      repeat         repetitions that had the bits of the first
      sanitizer      tool, cases, output_tail
      probes         read_gb_s, copy_gb_s (bytes read + bytes written), bf16_tflops
      timing         copy_gb_s and rows: name, bytes (read + written), kernel_us, copy_us (a plain copy that moves as
                     many bytes), gb_s, of_copy (gb_s / copy_gb_s), torch_us (rotation and index_put in plain torch;
                     null for panels), speedup (torch_us / kernel_us), call_us (host time of an eager call)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from device_stages.report import Report, write_atomically


class Stage(NamedTuple):
    name: str
    module: str  # in device_stages; its function of the stage's name runs it
    limit: int  # seconds
    correctness: bool
    on_cpu: bool  # also part of a dry run


STAGES = (
    Stage("environment", "probes", 60, False, True),
    Stage("correctness", "correctness", 150, True, True),
    Stage("graph", "correctness", 60, True, False),
    Stage("repeat", "correctness", 60, True, True),
    Stage("sanitizer", "sanitizer", 120, True, False),
    Stage("probes", "probes", 60, False, False),
    Stage("timing", "timing", 120, False, False),
)
EXIT_PASSED, EXIT_FAILED, EXIT_NO_DEVICE = 0, 1, 2


def run_stage(stage: Stage, args: argparse.Namespace, limit: float) -> dict:
    """Runs a stage in a child process; what it saved last counts if it does not come to an end."""
    result_path = args.out / f".{stage.name}.json"
    result_path.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage.name, "--result", str(result_path)]
    command += ["--library", str(args.library), "--out", str(args.out), "--device", args.device]
    start, status, reason = time.monotonic(), None, None
    try:
        child = subprocess.run(command, timeout=limit, capture_output=True, text=True, errors="replace")
        if child.returncode != 0:
            status, reason = "error", f"exit status {child.returncode}: {(child.stderr or child.stdout)[-2000:]}"
    except subprocess.TimeoutExpired:
        status, reason = "timeout", f"not finished within {limit:.0f} s"
    result = json.loads(result_path.read_text()) if result_path.exists() else {}
    result_path.unlink(missing_ok=True)
    if status is not None:
        result |= {"status": status, "reason": reason}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def run_all(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, dry_run=args.device == "cpu")
    stages = [stage for stage in STAGES if args.device == "cuda" or stage.on_cpu]
    deadline = time.monotonic() + args.time_limit
    for stage in stages:
        limit = min(stage.limit, deadline - time.monotonic())
        if limit < 5:
            result = {"status": "skipped", "reason": f"the time limit of {args.time_limit} s was used up"}
        else:
            print(f"{stage.name} ...", flush=True)
            result = run_stage(stage, args, limit)
        report.add(stage.name, result, finished=stage is stages[-1], correctness=stage.correctness)
        print(f"{stage.name}: {result['status']} {result.get('reason', '')}".rstrip(), flush=True)
        for failure in result.get("failures", [])[:5]:
            print(f"  {failure}")
        if stage.name == "environment" and result.get("no_device"):
            print("device_check: no CUDA device, nothing was checked (--device cpu is a dry run)", file=sys.stderr)
            return EXIT_NO_DEVICE
    print(f"report: {report.markdown_path}")
    return EXIT_PASSED if report.passed else EXIT_FAILED


def run_child(args: argparse.Namespace) -> int:
    from importlib import import_module

    from device_stages.context import Context

    stage = next(stage for stage in STAGES if stage.name == args.stage)
    context = Context(args.library, args.device, lambda result: write_atomically(args.result, json.dumps(result)))
    getattr(import_module(f"device_stages.{stage.module}"), stage.name)(context)
    context.finish()
    return EXIT_PASSED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libdiffqkv.so")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.library.is_file():
        parser.error(f"--library: got {args.library}, want an existing file")
    args.library, args.out = args.library.resolve(), args.out.resolve()
    return run_child(args) if args.stage else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
