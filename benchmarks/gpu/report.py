"""The report of device_check: JSON for programs, Markdown for people, complete after every job."""

from __future__ import annotations

import json
from pathlib import Path

from diffqkv.benchmarks.common.line import cells
from diffqkv.benchmarks.common.report import table, write

_HIDDEN = {"status", "seconds", "reason", "failures", "rows", "output_tail", "reached", "left_out"}


class Report:
    """Collects the results of jobs and rewrites both files at each `add`. deciding: the steps that an op must pass."""

    def __init__(self, folder: Path, ops: list[str], deciding: list[str], dry_run: bool):
        self.json_path, self.markdown_path = folder / "device_check.json", folder / "device_check.md"
        self.ops, self._deciding, self._dry_run = ops, deciding, dry_run
        self._steps: dict[str, dict] = {}
        self._finished = False

    def open(self, step: str, planned: float) -> None:
        self._steps[step] = {"planned_s": planned, "seconds": None, "jobs": {}}

    def add(self, step: str, job: str, result: dict) -> None:
        self._steps[step]["jobs"][job] = result
        self._write()

    def close(self, step: str, seconds: float) -> None:
        self._steps[step]["seconds"] = round(seconds, 1)

    def finish(self) -> None:
        self._finished = True
        self._write()

    def result(self, step: str, job: str) -> dict:
        return self._steps.get(step, {"jobs": {}})["jobs"].get(job, {})

    @property
    def ready(self) -> list[str]:
        return [op for op in self.ops if all(self._passed(step, op) for step in self._deciding)]

    @property
    def passed(self) -> bool:
        missing = [op for op in self.ops if self.result("smoke", op).get("status") == "missing"]
        return self._finished and len(missing) < len(self.ops) and set(self.ready) | set(missing) == set(self.ops)

    @staticmethod
    def rows(result: dict) -> list[dict[str, str]]:
        """The lines of the benchmark in a result, as texts by column."""
        return [cells(record) for record in result.get("rows", [])]

    def _passed(self, step: str, op: str) -> bool:
        """A tool that is missing skips its step; that says nothing about the kernels. Running out of time does."""
        result = self.result(step, op)
        return result.get("status") == "passed" or result.get("tool_missing", False)

    def _write(self) -> None:
        environment = self.result("environment", "all").get("environment", {})
        content = {"format": 3, "passed": self.passed, "dry_run": self._dry_run, "ready": self.ready}
        content |= {"environment": environment, "steps": self._steps}
        write(self.json_path, json.dumps(content, indent=1) + "\n")
        write(self.markdown_path, self._markdown(environment))

    def _markdown(self, environment: dict) -> str:
        verdict = ("passed" if self.passed else "FAILED") if self._finished else "not finished"
        lines = [f"# Device check: {verdict}", ""]
        if self._dry_run:
            lines += ["Dry run on the CPU kernels: says nothing about a GPU.", ""]
        deciding = [step for step in self._deciding if step in self._steps]
        ops = [{"op": f"`{op}`"} | {x: _note(self.result(x, op)) for x in deciding} for op in self.ops]
        steps = []
        for name, step in self._steps.items():
            notes = [] if name in deciding else [_note(job) for job in step["jobs"].values()]
            times = {"planned s": str(step["planned_s"]), "s": str(step["seconds"])}
            steps.append({"step": name} | times | {"result": "; ".join(notes)})
        for rows in ([{"": key, "value": str(value)} for key, value in environment.items()], ops, steps):
            lines += [*table(rows), ""]

        for name, step in self._steps.items():
            for job, result in step["jobs"].items():
                title = name if job == "all" else f"{name}, {job}"
                if result["status"] not in ("passed", "missing"):
                    reason = f"- {result['status']}: {result.get('reason', '')}".rstrip()
                    failures = [f"- {failure}" for failure in result.get("failures", [])[:30]]
                    lines += [f"## Not passed: {title}", "", reason, *failures, ""]
                if result.get("rows"):
                    lines += [f"## {title}", "", *table(self.rows(result)), ""]
                    lines += [f"Left out: {'; '.join(result['left_out'])}", ""] if result.get("left_out") else []
        return "\n".join(lines)


def _note(result: dict) -> str:
    """The status of a job and its figures."""
    if not result:
        return ""
    figures = {k: v for k, v in result.items() if k not in _HIDDEN and not isinstance(v, (dict, list, bool))}
    text = ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in figures.items())
    return f"{result['status']} ({text})" if text else result["status"]
