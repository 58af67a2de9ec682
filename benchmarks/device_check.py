"""Checks and measures the CUDA kernels on a GPU at hand, in one command and less than ten minutes.

    python benchmarks/device_check.py --library build/libdiffqkv.so --out report/

Needs torch >= 2.11 and a libdiffqkv.so, which may have been built elsewhere; the package need not be installed.
Stages run in the order of their importance, each op in a process of its own with a time limit: neither a crash nor a
hang takes the others along, and the report (device_check.json, device_check.md) is rewritten after each. An op that
fails the first small call is not tried further; speed is measured of ops only whose results are right.
`--device cpu` is a dry run of the same through the CPU kernels, at small sizes, without graphs, compute-sanitizer and
probes.

Exit status: 0 correct, 1 an op did not pass, 2 no CUDA device.

device_check.json:
    format         2
    passed         whether every op that the library has passed every stage that says whether it is right
    ready          the ops that did; their names may go into CUDA_TESTED of python/diffqkv/dispatch.py
    environment    date, GPU, driver, torch, library (path, sha256), commit
    stages         by name: planned_s, seconds, and jobs by op (or "all"): status (passed, failed, error, timeout,
                   skipped, missing), seconds, reason (of anything but passed), failures (texts), and figures:
      correctness    cases: against the reference in float64
      stability      repetitions and entries_alone with the same bits; replays of CUDA graphs compared with eager calls
      large          far_strides: calls with 2^31 elements between two indices
      memcheck, racecheck   cases under compute-sanitizer, output_tail
      contract       opchecks
      probes         read_gb_s, copy_gb_s (read + written), bf16_tflops, clocks
      decode, prefill, backward, selective, cache_update, swiglu
                     rows: lines of the benchmark with their targets, left_out
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
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
_LEAST = 2  # seconds that a stage is worth starting for


class Stage(NamedTuple):
    """A stage gets its planned seconds, and up to `limit` where the others leave them."""

    name: str  # and that of its function
    module: str
    planned: int
    limit: int
    decides: bool = False  # whether an op is right; then it has a job for each op
    on_cpu: bool = True  # also part of a dry run
    workers: int = 8
    needs: tuple[str, ...] = ()  # ops that must be right


STAGES = (
    Stage("environment", "device_stages.probes", 10, 60),
    Stage("smoke", "device_stages.checks", 25, 60, decides=True),
    Stage("correctness", "device_stages.checks", 60, 150, decides=True),
    Stage("stability", "device_stages.checks", 40, 100, decides=True),
    Stage("large", "device_stages.checks", 25, 60, decides=True, workers=2),  # of memory
    Stage("memcheck", "device_stages.sanitizer", 50, 100, decides=True, on_cpu=False),
    Stage("racecheck", "device_stages.sanitizer", 35, 70, decides=True, on_cpu=False),
    Stage("contract", "device_stages.checks", 30, 60, decides=True),
    Stage("probes", "device_stages.probes", 12, 30, on_cpu=False),
    Stage("decode", "device_stages.figures.sections", 70, 150, needs=("decode_attention",)),
    Stage("prefill", "device_stages.figures.sections", 30, 60, needs=("flash_attention",)),
    Stage("backward", "device_stages.figures.sections", 35, 70, needs=("flash_attention", "flash_attention_backward")),
    Stage("selective", "device_stages.figures.sections", 25, 50, needs=("selective_v_attention", "decode_attention")),
    Stage("cache_update", "device_stages.figures.sections", 15, 40, needs=("kv_cache_update",)),
    Stage("swiglu", "device_stages.figures.sections", 8, 30, needs=("swiglu", "swiglu_backward")),
)
# What a dry run compares its lines with.
_PEAKS_OF_A_DRY_RUN = {"read_gb_s": 10.0, "copy_gb_s": 10.0, "bf16_tflops": 0.1}


class Check:
    """A run: what is still in question, and how much time is left."""

    def __init__(self, args: argparse.Namespace):
        from device_stages.report import Report

        self.args = args
        self.stages = [stage for stage in STAGES if args.device == "cuda" or stage.on_cpu]
        self.stages = [x for x in self.stages if x.name in (args.stages or [x.name]) or x.name == "environment"]
        deciding = [stage.name for stage in self.stages if stage.decides]
        self.report = Report(args.out, [op for op in OPS if op in args.ops], deciding, dry_run=args.device == "cpu")
        self.deadline = time.monotonic() + args.time_limit

    def run(self) -> int:
        planned = sum(stage.planned for stage in self.stages)
        print(f"planned: {planned} s of {self.args.time_limit:.0f} s")
        for i, stage in enumerate(self.stages):
            later = sum(stage.planned for stage in self.stages[i + 1 :])
            left = self.deadline - time.monotonic()
            limit = min(stage.limit, left - later * min(1.0, self.args.time_limit / planned))
            print(f"{stage.name} (planned {stage.planned} s, at most {limit:.0f} s)", flush=True)
            start = time.monotonic()
            self._run_stage(stage, limit)
            self.report.close(stage.name, time.monotonic() - start)
            environment = self.report.result("environment", "all")
            if environment["status"] != "passed":
                print(f"device_check: {environment['reason']}; nothing was checked", file=sys.stderr)
                return EXIT_NO_DEVICE if environment.get("no_device") else EXIT_FAILED
        self.report.finish()
        print(f"ready: {', '.join(self.report.ready) or 'none'}")
        print(f"report: {self.report.markdown_path}")
        return EXIT_PASSED if self.report.passed else EXIT_FAILED

    def _run_stage(self, stage: Stage, limit: float) -> None:
        from device_stages import jobs

        self.report.open(stage.name, stage.planned)
        wanted = []
        for name in self.report.ops if stage.decides else ["all"]:
            refusal = self._refusal(stage, name)
            if refusal is None and limit < _LEAST:
                refusal = {"status": "skipped", "reason": f"the {self.args.time_limit:.0f} s were used up"}
            if refusal is not None:
                self._done(stage, name, refusal | {"seconds": 0.0})
                continue
            arguments: tuple = ()
            if stage.decides:
                arguments = (name,)
            elif stage.name == "environment":
                arguments = (self.args.commit,)
            elif stage.needs:
                arguments = (self._peaks(),)
            wanted.append(jobs.Job(name, stage.module, stage.name, arguments))
        workers = min(stage.workers, max(2, os.cpu_count() or 1))
        done = lambda job, result: self._done(stage, job.name, result)  # noqa: E731
        jobs.run(wanted, self.args.device, self.args.out, limit, workers, done)

    def _refusal(self, stage: Stage, name: str) -> dict | None:
        """Why a job is not run."""
        has_kernel = self.report.result("environment", "all").get("kernels", {}) if stage.name != "environment" else {}
        for op in (name,) if stage.decides else stage.needs:
            if not has_kernel[op]:
                return {"status": "missing", "reason": f"the library has no {self.args.device} kernel of {op}"}
            for earlier in ("smoke", "correctness"):
                result = self.report.result(earlier, op)
                if earlier != stage.name and result.get("status", "passed") != "passed":
                    if not stage.decides or earlier == "smoke":
                        return {"status": "skipped", "reason": f"{op}: {earlier} {result['status']}"}
        if stage.needs and not self._peaks():
            return {"status": "skipped", "reason": "no probes to compare with"}
        return None

    def _peaks(self) -> dict | None:
        if self.args.device == "cpu":
            return _PEAKS_OF_A_DRY_RUN
        probes = self.report.result("probes", "all")
        return {name: probes[name] for name in _PEAKS_OF_A_DRY_RUN} if probes.get("status") == "passed" else None

    def _done(self, stage: Stage, name: str, result: dict) -> None:
        self.report.add(stage.name, name, result)
        if stage.decides or result["status"] != "passed":
            note = "" if result["status"] == "passed" else f": {result.get('reason', '').strip().splitlines()[-1:]}"
            print(f"  {name}: {result['status']}{note}", flush=True)
        for failure in result.get("failures", [])[:5]:
            print(f"    {failure}")
        for row in result.get("rows", []):
            targets = "; ".join(f"{t['target']}: {'met' if t['met'] else 'missed'}" for t in row["targets"])
            print(f"    {row['name']}: {row['µs']:.4g} µs. {targets}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libdiffqkv.so")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help="only these")
    parser.add_argument("--stages", nargs="+", choices=[x.name for x in STAGES], metavar="STAGE", help="only these")
    parser.add_argument("--commit", help="of the library, where there is no checkout to ask")
    args = parser.parse_args()
    if not args.library.is_file():
        parser.error(f"--library: got {args.library}, want an existing file")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # For the processes of the jobs.
    os.environ["DIFFQKV_LIBRARY"] = str(args.library.resolve())
    os.environ["DIFFQKV_CUDA_UNTESTED"] = "1"
    folders = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "python"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return Check(args).run()


if __name__ == "__main__":
    sys.exit(main())
