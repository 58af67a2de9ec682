"""Checks and measures the CUDA kernels on a GPU at hand, in one command and less than ten minutes.

    python benchmarks/device_check.py --library build/libdiffqkv.so --out report/

Needs torch >= 2.11 and a libdiffqkv.so, which may have been built elsewhere; the package need not be installed.
Steps run in the order of their importance, each op in a process of its own with a time limit: neither a crash nor a
hang takes the others along, and the report (device_check.json, device_check.md) is rewritten after each. An op that
fails the first small call is not tried further; speed is measured of ops only whose results are right.
`--device cpu` is a dry run of the same through the CPU kernels, at small sizes, without graphs, compute-sanitizer and
probes.

Exit status: 0 correct, 1 an op did not pass, 2 no CUDA device.

device_check.json:
    format         3
    passed         whether every op that the library has passed every step that says whether it is right
    ready          the ops that did; their names may go into CUDA_TESTED of python/diffqkv/ops/dispatch.py
    environment    date, GPU, driver, torch, library (path, sha256), commit
    steps          by name: planned_s, seconds, and jobs by op (or "all"): status (passed, failed, error, timeout,
                   skipped, missing), seconds, reason (unless passed), failures (texts), and figures:
      correctness    cases: against the reference in float64
      stability      repetitions and entries_alone with the same bits; replays of CUDA graphs compared with eager calls
      large          far_strides: calls with 2^31 elements between two indices
      memcheck, racecheck   cases under compute-sanitizer, output_tail
      contract       opchecks
      probes         read_gb_s, copy_gb_s (read + written), bf16_tflops, clocks
      an op's name   rows: lines of its benchmark, as `measure` of python/diffqkv/benchmarks/common/line.py returns
                     them, and left_out
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

FOLDERS = [str(Path(__file__).resolve().parents[1] / name) for name in ("benchmarks", "python")]
OPS = (
    "decode_attention",
    "flash_attention",
    "flash_attention_backward",
    "kv_cache_update",
    "selective_v_attention",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
    "swiglu",
    "swiglu_backward",
)
EXIT_PASSED, EXIT_FAILED, EXIT_NO_DEVICE = 0, 1, 2
_LEAST = 2  # seconds that a step is worth starting for


class Step(NamedTuple):
    """A step gets its planned seconds, and up to `limit` where the others leave them."""

    name: str  # and that of its function
    module: str
    planned: int
    limit: int
    decides: bool = False  # whether an op is right; then it has a job for each op
    on_cpu: bool = True  # also part of a dry run
    workers: int = 8
    needs: tuple[str, ...] = ()  # ops that must be right


def _speed(op: str, planned: int, limit: int, *besides: str) -> Step:
    return Step(op, f"gpu.speed.{op}", planned, limit, needs=(op, *besides))


STEPS = (
    Step("environment", "gpu.device", 10, 60),
    Step("smoke", "gpu.checks", 25, 60, decides=True),
    Step("correctness", "gpu.checks", 60, 150, decides=True),
    Step("stability", "gpu.checks", 40, 100, decides=True),
    Step("large", "gpu.checks", 25, 60, decides=True, workers=2),  # each takes much memory
    Step("memcheck", "gpu.sanitizer", 50, 100, decides=True, on_cpu=False),
    Step("racecheck", "gpu.sanitizer", 35, 70, decides=True, on_cpu=False),
    Step("contract", "gpu.checks", 30, 60, decides=True),
    Step("probes", "gpu.device", 12, 30, on_cpu=False),
    _speed("decode_attention", 70, 150),
    _speed("flash_attention", 30, 60),
    _speed("flash_attention_backward", 35, 70, "flash_attention"),
    _speed("selective_v_attention", 25, 50, "decode_attention"),
    _speed("kv_cache_update", 15, 40),
    _speed("swiglu", 8, 30, "swiglu_backward"),
)
# What a dry run compares its lines with.
_PEAKS_OF_A_DRY_RUN = {"read_gb_s": 10.0, "copy_gb_s": 10.0, "bf16_tflops": 0.1}


class Check:
    """A run: what is still in question, and how much time is left."""

    def __init__(self, args: argparse.Namespace):
        from gpu.report import Report

        self.args = args
        self.steps = [step for step in STEPS if args.device == "cuda" or step.on_cpu]
        self.steps = [x for x in self.steps if x.name in (args.steps or [x.name]) or x.name == "environment"]
        deciding = [step.name for step in self.steps if step.decides]
        self.report = Report(args.out, [op for op in OPS if op in args.ops], deciding, dry_run=args.device == "cpu")
        self.deadline = time.monotonic() + args.time_limit

    def run(self) -> int:
        planned = sum(step.planned for step in self.steps)
        print(f"planned: {planned} s of {self.args.time_limit:.0f} s")
        for i, step in enumerate(self.steps):
            later = sum(step.planned for step in self.steps[i + 1 :])
            left = self.deadline - time.monotonic()
            limit = min(step.limit, left - later * min(1.0, self.args.time_limit / planned))
            print(f"{step.name} (planned {step.planned} s, at most {limit:.0f} s)", flush=True)
            start = time.monotonic()
            self._run_step(step, limit)
            self.report.close(step.name, time.monotonic() - start)
            environment = self.report.result("environment", "all")
            if environment["status"] != "passed":
                print(f"device_check: {environment['reason']}; nothing was checked", file=sys.stderr)
                return EXIT_NO_DEVICE if environment.get("no_device") else EXIT_FAILED
        self.report.finish()
        print(f"ready: {', '.join(self.report.ready) or 'none'}")
        print(f"report: {self.report.markdown_path}")
        return EXIT_PASSED if self.report.passed else EXIT_FAILED

    def _run_step(self, step: Step, limit: float) -> None:
        from gpu import jobs

        self.report.open(step.name, step.planned)
        wanted = []
        for name in self.report.ops if step.decides else ["all"]:
            refusal = self._refusal(step, name)
            if refusal is None and limit < _LEAST:
                refusal = {"status": "skipped", "reason": f"the {self.args.time_limit:.0f} s were used up"}
            if refusal is not None:
                self._done(step, name, refusal | {"seconds": 0.0})
                continue
            arguments: tuple = ()
            if step.decides:
                arguments = (name,)
            elif step.name == "environment":
                arguments = (self.args.commit,)
            elif step.needs:
                arguments = (self._peaks(),)
            wanted.append(jobs.Job(name, step.module, step.name, arguments))
        workers = min(step.workers, max(2, os.cpu_count() or 1))
        done = lambda job, result: self._done(step, job.name, result)  # noqa: E731
        jobs.run(wanted, self.args.device, self.args.out, limit, workers, done)

    def _refusal(self, step: Step, name: str) -> dict | None:
        """Why a job is not run."""
        has_kernel = self.report.result("environment", "all").get("kernels", {}) if step.name != "environment" else {}
        for op in (name,) if step.decides else step.needs:
            if not has_kernel[op]:
                return {"status": "missing", "reason": f"the library has no {self.args.device} kernel of {op}"}
            for earlier in ("smoke", "correctness"):
                result = self.report.result(earlier, op)
                if earlier != step.name and result.get("status", "passed") != "passed":
                    if not step.decides or earlier == "smoke":
                        return {"status": "skipped", "reason": f"{op}: {earlier} {result['status']}"}
        if step.needs and not self._peaks():
            return {"status": "skipped", "reason": "no probes to compare with"}
        return None

    def _peaks(self) -> dict | None:
        if self.args.device == "cpu":
            return _PEAKS_OF_A_DRY_RUN
        probes = self.report.result("probes", "all")
        return {name: probes[name] for name in _PEAKS_OF_A_DRY_RUN} if probes.get("status") == "passed" else None

    def _done(self, step: Step, name: str, result: dict) -> None:
        self.report.add(step.name, name, result)
        if step.decides or result["status"] != "passed":
            note = "" if result["status"] == "passed" else f": {result.get('reason', '').strip().splitlines()[-1:]}"
            print(f"  {name}: {result['status']}{note}", flush=True)
        for failure in result.get("failures", [])[:5]:
            print(f"    {failure}")
        for row in self.report.rows(result):
            print(f"    {'; '.join(f'{column} {text}' for column, text in row.items() if text)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libdiffqkv.so")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help="only these")
    parser.add_argument("--steps", nargs="+", choices=[x.name for x in STEPS], metavar="STEP", help="only these")
    parser.add_argument("--commit", help="of the library, where there is no checkout to ask")
    args = parser.parse_args()
    if not args.library.is_file():
        parser.error(f"--library: got {args.library}, want an existing file")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # For the processes of the jobs.
    os.environ["DIFFQKV_LIBRARY"] = str(args.library.resolve())
    os.environ["DIFFQKV_CUDA_UNTESTED"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH")]))
    _import_without_the_library()
    return Check(args).run()


def _import_without_the_library() -> None:
    """This process only writes down what the jobs find: a library that crashes when it is loaded must not end it."""
    sys.path[:0] = FOLDERS
    sys.modules.setdefault("transformers", None)  # the package would import it, for seconds
    os.environ["DIFFQKV_DISABLE_LIBRARY"] = "1"
    importlib.import_module("gpu.report")
    del os.environ["DIFFQKV_DISABLE_LIBRARY"]


if __name__ == "__main__":
    sys.exit(main())
