"""Processes with a time limit, several at a time: neither a crash nor a hang takes the others along."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

# Not worker itself, which imports torch: only the fork server and its children do.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["gpu.worker"])


class Job(NamedTuple):
    name: str
    module: str
    function: str
    arguments: tuple


def _work(*arguments) -> None:
    import_module("gpu.worker").work(*arguments)


class _Running:
    def __init__(self, job: Job, device: str, threads: int, folder: Path):
        self.job, self.start = job, time.monotonic()
        self.result, self.log = folder / f".{job.function}.{job.name}.json", folder / f".{job.function}.{job.name}.log"
        self.result.unlink(missing_ok=True)
        arguments = (job.module, job.function, job.arguments, device, threads, self.result, self.log)
        self.process = _PROCESSES.Process(target=_work, args=arguments)
        self.process.start()

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not have its group yet
        self.process.join(5)

    def collect(self, limit: float | None = None) -> dict:
        """What the job saved last, and how it ended; limit: it was killed after so many seconds."""
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        result = json.loads(self.result.read_text()) if self.result.exists() else {}
        code = self.process.exitcode
        if limit is not None:
            result |= {"status": "timeout", "reason": f"not finished within {limit:.0f} s"}
        elif code != 0:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            result |= {"status": "error", "reason": f"{how}: {output[-1500:].strip()}"}
        for path in (self.result, self.log):
            path.unlink(missing_ok=True)
        return result | {"seconds": round(time.monotonic() - self.start, 1)}


def run(
    jobs: Iterable[Job], device: str, folder: Path, limit: float, workers: int, done: Callable[[Job, dict], None]
) -> None:
    """Runs the jobs in their order, at most `workers` at a time; whatever runs after `limit` seconds is killed."""
    waiting, running = list(jobs), []
    threads = max(1, (os.cpu_count() or 1) // workers)
    start = time.monotonic()
    try:
        while waiting or running:
            left = limit - (time.monotonic() - start)
            if left <= 0:
                break
            while waiting and len(running) < workers:
                running.append(_Running(waiting.pop(0), device, threads, folder))
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                done(one.job, one.collect())
            time.sleep(0.02)
    finally:
        for one in running:
            one.kill()
    for one in running:
        done(one.job, one.collect(limit))
    for job in waiting:
        done(job, {"status": "skipped", "reason": f"the step's {limit:.0f} s were used up", "seconds": 0.0})
