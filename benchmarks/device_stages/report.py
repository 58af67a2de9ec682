"""The report of device_check: JSON for programs, Markdown for people, complete after every stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

_HIDDEN = {"status", "seconds", "reason", "failures", "rows", "output_tail"}


def write_atomically(path: Path, text: str) -> None:
    """A reader, or what an interrupted run leaves, is the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


class Report:
    """Collects the stages' results and rewrites both files at each `add`."""

    def __init__(self, folder: Path, dry_run: bool):
        self.json_path, self.markdown_path = folder / "device_check.json", folder / "device_check.md"
        self._dry_run = dry_run
        self._stages: dict[str, dict] = {}
        self._all_correct = True
        self.passed = False

    def add(self, name: str, result: dict, *, finished: bool, correctness: bool) -> None:
        self._stages[name] = result
        # A tool that is missing skips its stage; that says nothing about the kernels. Running out of time does.
        tool_missing = result["status"] == "skipped" and result.get("tool_missing", False)
        if correctness and result["status"] != "passed" and not tool_missing:
            self._all_correct = False
        self.passed = finished and self._all_correct
        environment = self._stages.get("environment", {}).get("environment", {})
        content = {"format": 1, "passed": self.passed, "dry_run": self._dry_run, "environment": environment}
        content["stages"] = self._stages
        write_atomically(self.json_path, json.dumps(content, indent=1) + "\n")
        write_atomically(self.markdown_path, self._markdown(environment, finished))

    def _markdown(self, environment: dict, finished: bool) -> str:
        verdict = ("passed" if self.passed else "FAILED") if finished else "not finished"
        lines = [f"# Device check: {verdict}", ""]
        if self._dry_run:
            lines += ["Dry run on the CPU kernels: says nothing about a GPU.", ""]
        lines += ["| | |", "|---|---|"] + [f"| {key} | {value} |" for key, value in environment.items()]
        lines += ["", "| stage | status | seconds | |", "|---|---|---|---|"]
        for name, stage in self._stages.items():
            figures = {k: v for k, v in stage.items() if k not in _HIDDEN and not isinstance(v, dict)}
            note = ", ".join(f"{key} {_figure(value)}" for key, value in figures.items())
            reason = stage.get("reason", "").strip().split("\n")[-1].replace("|", "\\|")
            note = "; ".join(part for part in (reason, note) if part)
            lines.append(f"| {name} | {stage['status']} | {stage.get('seconds', '')} | {note} |")
        for name, stage in self._stages.items():
            if stage.get("failures"):
                lines += ["", f"## Failures: {name}", ""] + [f"- {failure}" for failure in stage["failures"][:50]]
        for name, stage in self._stages.items():
            if stage.get("rows"):
                columns = list(stage["rows"][0])
                lines += ["", f"## {name}", "", _row(columns), _row(["---"] * len(columns))]
                lines += [_row([_figure(row[column]) for column in columns]) for row in stage["rows"]]
        return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
