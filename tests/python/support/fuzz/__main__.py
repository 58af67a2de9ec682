"""Makes random calls in processes of their own, and prints what is wrong with the line that repeats it alone.

`--op OP --seed N` is one call. With `--calls` or `--minutes`, N is the first of many. The processes take turns through
the instruction sets of this CPU, unless DIFFQKV_CPU_ISA chooses one. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .calls import OPS, run

HERE = Path(__file__).parent.parent
LIFE = 60.0  # seconds of a process, whose successor takes the next instruction set
PATIENCE = 240.0  # seconds for a call
MOST_PRINTED = 20  # finds of an op


def attempt(op: str, seed: int) -> str | None:
    """What is wrong with a call."""
    try:
        run(op, seed)
    except Exception as error:
        lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        if not isinstance(error, AssertionError):
            lines += "".join(traceback.format_tb(error.__traceback__)[-3:]).splitlines()
        return "\n  ".join(lines)
    return None


def work() -> None:
    """A process: reads `op seed` lines, answers each by a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that others print is an answer
    for line in sys.stdin:
        op, seed = line.split()
        print(json.dumps(attempt(op, int(seed))), file=answers, flush=True)


def levels() -> list[str]:
    """The best instruction set first."""
    if chosen := os.environ.get("DIFFQKV_CPU_ISA"):
        return [chosen]
    from diffqkv import _core

    return _core.cpu_isa_levels()[::-1]


class Campaign:
    def __init__(self, calls: Iterator[tuple[str, int]], until: float):
        self.calls, self.until, self.lock = calls, until, threading.Lock()
        self.made: Counter[str] = Counter()
        self.found: Counter[str] = Counter()

    def next(self) -> tuple[str, int] | None:
        with self.lock:
            return None if time.monotonic() > self.until else next(self.calls, None)

    def note(self, op: str, seed: int, level: str, text: str | None) -> None:
        with self.lock:
            self.made[op] += 1
            if text is None:
                return
            self.found[op] += 1
            if self.found[op] <= MOST_PRINTED:
                folder = os.path.relpath(HERE)
                again = f"DIFFQKV_CPU_ISA={level} PYTHONPATH={folder} python -m fuzz --op {op} --seed {seed}"
                print(f"{again}\n  {text}", flush=True)

    def run(self, number: int) -> None:
        """Keeps one process at work."""
        known = levels()
        for turn in itertools.count(number):
            if not self._life(known[turn % len(known)]):
                return

    def _life(self, level: str) -> bool:
        """Of one process, until it is old or dies. False: no calls are left."""
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"DIFFQKV_CPU_ISA": level, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
        command, pipe = [sys.executable, "-m", "fuzz", "--work"], subprocess.PIPE
        with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
            end = time.monotonic() + LIFE
            while time.monotonic() < end:
                call = self.next()
                if call is None:
                    process.stdin.close()
                    return False
                watch = threading.Timer(PATIENCE, process.kill)
                watch.start()
                try:
                    print(*call, file=process.stdin, flush=True)
                    answer = process.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                watch.cancel()
                if not answer:
                    code = process.wait()
                    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    slow = f", after {PATIENCE:.0f} s" if code == -signal.SIGKILL else ""
                    self.note(*call, level, f"the process died: {name}{slow}")
                    break
                self.note(*call, level, json.loads(answer))
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="default: all, by turns")
    parser.add_argument("--seed", type=int, help="default: new ones")
    parser.add_argument("--calls", type=int, help="of each op")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        work()
        return 0
    ops = [args.op] if args.op else list(OPS)
    if args.calls is None and args.minutes is None:
        if args.seed is None:
            parser.error("one of --seed, --calls, --minutes is required")
        finds = {op: attempt(op, args.seed) for op in ops}
        for op, found in finds.items():
            print(f"{op} {args.seed}: {found or 'right'}")
        return 1 if any(finds.values()) else 0

    first, begin = int(time.time()) * 1000 if args.seed is None else args.seed, time.monotonic()
    seeds = itertools.count(first) if args.calls is None else range(first, first + args.calls)
    campaign = Campaign(
        ((op, seed) for seed in seeds for op in ops),
        float("inf") if args.minutes is None else begin + 60 * args.minutes,
    )
    print(f"seeds from {first} on", flush=True)
    threads = [threading.Thread(target=campaign.run, args=(n,)) for n in range(args.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begin
    for op in ops:
        print(
            f"{op}: {campaign.made[op]} calls, {campaign.made[op] / seconds:.1f} per second, {campaign.found[op]} wrong"
        )
    return 1 if campaign.found.total() else 0


if __name__ == "__main__":
    sys.exit(main())
