"""What a run leaves: Markdown tables, the commit that it measured, files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table; a row without a column has a dash there."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns] + [[row.get(column, "–") for column in columns] for row in rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]


def commit() -> str | None:
    """The commit of this file, where it lies in a checkout of its own project."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", file.parent, *arguments], capture_output=True, text=True)

    try:
        tracked = git("ls-files", "--error-unmatch", file.name).returncode == 0
        return git("describe", "--always", "--dirty", "--exclude=*").stdout.strip() or None if tracked else None
    except OSError:  # no git
        return None


def write(path: Path, text: str) -> None:
    """Writes the file at once or not at all: an interrupted run leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
