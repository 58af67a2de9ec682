"""The report of device_check: JSON for programs, Markdown for people, complete after every job."""

from __future__ import annotations

import json
import os
from pathlib import Path

_HIDDEN = {"status", "seconds", "reason", "failures", "rows", "output_tail", "reached", "left_out"}
_HIDDEN_COLUMNS = {"dims", "batch", "tokens"}  # the name has them


def write_atomically(path: Path, text: str) -> None:
    """A reader, or what an interrupted run leaves, is the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


class Report:
    """Collects the results of jobs and rewrites both files at each `add`. deciding: the stages that an op must pass."""

    def __init__(self, folder: Path, ops: list[str], deciding: list[str], dry_run: bool):
        self.json_path, self.markdown_path = folder / "device_check.json", folder / "device_check.md"
        self.ops, self._deciding, self._dry_run = ops, deciding, dry_run
        self._stages: dict[str, dict] = {}
        self._finished = False

    def open(self, stage: str, planned: float) -> None:
        self._stages[stage] = {"planned_s": planned, "seconds": None, "jobs": {}}

    def add(self, stage: str, job: str, result: dict) -> None:
        self._stages[stage]["jobs"][job] = result
        self._write()

    def close(self, stage: str, seconds: float) -> None:
        self._stages[stage]["seconds"] = round(seconds, 1)

    def finish(self) -> None:
        self._finished = True
        self._write()

    def result(self, stage: str, job: str) -> dict:
        return self._stages.get(stage, {"jobs": {}})["jobs"].get(job, {})

    @property
    def ready(self) -> list[str]:
        return [op for op in self.ops if all(self._passed(stage, op) for stage in self._deciding)]

    @property
    def passed(self) -> bool:
        missing = [op for op in self.ops if self.result("smoke", op).get("status") == "missing"]
        return self._finished and len(missing) < len(self.ops) and set(self.ready) | set(missing) == set(self.ops)

    def _passed(self, stage: str, op: str) -> bool:
        """A tool that is missing skips its stage; that says nothing about the kernels. Running out of time does."""
        result = self.result(stage, op)
        return result.get("status") == "passed" or result.get("tool_missing", False)

    def _write(self) -> None:
        environment = self.result("environment", "all").get("environment", {})
        content = {"format": 2, "passed": self.passed, "dry_run": self._dry_run, "ready": self.ready}
        content |= {"environment": environment, "stages": self._stages}
        write_atomically(self.json_path, json.dumps(content, indent=1) + "\n")
        write_atomically(self.markdown_path, self._markdown(environment))

    def _markdown(self, environment: dict) -> str:
        verdict = ("passed" if self.passed else "FAILED") if self._finished else "not finished"
        lines = [f"# Device check: {verdict}", ""]
        if self._dry_run:
            lines += ["Dry run on the CPU kernels: says nothing about a GPU.", ""]
        lines += ["| | |", "|---|---|"] + [f"| {key} | {value} |" for key, value in environment.items()]

        deciding = [stage for stage in self._deciding if stage in self._stages]
        lines += ["", _row(["op", *deciding]), _row(["---"] * (len(deciding) + 1))]
        for op in self.ops:
            lines.append(_row([f"`{op}`", *(_note(self.result(stage, op)) for stage in deciding)]))
        lines += ["", "| stage | planned s | s | |", "|---|---|---|---|"]
        for name, stage in self._stages.items():
            notes = [] if name in deciding else [_note(job) for job in stage["jobs"].values()]
            lines.append(_row([name, str(stage["planned_s"]), str(stage["seconds"]), "; ".join(notes)]))

        for name, stage in self._stages.items():
            for job, result in stage["jobs"].items():
                title = name if job == "all" else f"{name}, {job}"
                if result["status"] not in ("passed", "missing"):
                    reason = [f"- {result['status']}: {result.get('reason', '')}".rstrip()]
                    failures = [f"- {failure}" for failure in result.get("failures", [])[:30]]
                    lines += ["", f"## Not passed: {title}", "", *reason, *failures]
                if result.get("rows"):
                    lines += ["", f"## {title}", "", *_table(result["rows"])]
                    lines += [f"\nLeft out: {'; '.join(result['left_out'])}"] if result.get("left_out") else []
        return "\n".join(lines) + "\n"


def _note(result: dict) -> str:
    """The status of a job and its figures."""
    if not result:
        return ""
    figures = {k: v for k, v in result.items() if k not in _HIDDEN and not isinstance(v, (dict, list, bool))}
    text = ", ".join(f"{key} {_figure(value)}" for key, value in figures.items())
    return f"{result['status']} ({text})" if text else result["status"]


def _table(rows: list[dict]) -> list[str]:
    columns = [x for x in dict.fromkeys(x for row in rows for x in row) if x not in _HIDDEN_COLUMNS]
    empty = {x for x in columns if all(row.get(x) in (None, []) for row in rows)}
    columns = [x for x in columns if x not in empty]
    cells = [[_figure(row.get(x)) for x in columns] for row in rows]
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _figure(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # of targets, or of notes
        return "; ".join(
            f"{x['target']}: {'met' if x['met'] else 'missed'}" if isinstance(x, dict) else str(x) for x in value
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)
