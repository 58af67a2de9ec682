"""The folder of a study: what it measures, and its samples, each on disk before the next is taken."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..benchmarks.common.report import write

_STUDY, _SAMPLES = "study.json", "samples.jsonl"


class Samples:
    """Samples of one study, in a folder that no other process writes meanwhile.

    identity: what a sample must have been taken with to be compared, by names: strings, numbers, lists of them and
    mappings. A study resumes in the folder of one that has the same.

    Raises:
        ValueError: the folder has samples of another study, named by the first thing that differs; or it is in use.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "study.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--out: got {folder}, where another study is under way, want another folder") from None
        try:
            self._check(identity)
            self._file = (folder / _SAMPLES).open("ab")
            self._records = self._read()
        except BaseException:
            self._lock.release()
            raise
        self._counts = Counter(map(_key, self._records))

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.release()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def count(self, **what: object) -> int:
        """How many samples there are of a kind, a system, and a size."""
        return self._counts[_key(what)]

    def add(self, seconds: dict[str, float], facts: dict[str, Any], **what: object) -> None:
        """Appends a sample: times, facts about the machine, and what was measured, as `count` takes it."""
        record = {**what, "seconds": seconds, **facts}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._records.append(record)
        self._counts[_key(record)] += 1

    def _check(self, identity: dict[str, Any]) -> None:
        file = self.folder / _STUDY
        identity = json.loads(json.dumps(identity))
        if not file.exists():
            write(file, json.dumps(identity, indent=1) + "\n")
            return
        known = self._parsed(file.read_bytes(), _STUDY)
        difference = _difference(known, identity)
        if difference:
            name, theirs, ours = difference
            raise ValueError(
                f"--out: got {self.folder} with samples of {name} {theirs}, want {ours} as now, or another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        file = self.folder / _SAMPLES
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a run was killed while it wrote its last sample
            os.truncate(file, whole)
        return [self._parsed(line, _SAMPLES) for line in data[:whole].splitlines()]

    def _parsed(self, text: bytes, file: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--out: got {self.folder} with a damaged {file} ({error}), want another folder") from None
        if not isinstance(found, dict) or (file == _SAMPLES and not found.keys() >= {"kind", "system", "seconds"}):
            raise ValueError(f"--out: got {self.folder} with a damaged {file} ({str(found)[:40]}), want another folder")
        return found


_WHAT = ("kind", "system", "dtype", "batch", "context", "prefix", "output")


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in _WHAT)


def _difference(known: object, wanted: object, name: str = "") -> tuple[str, object, object] | None:
    """The first thing that differs: its name, and both values."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for key in {**wanted, **known}:
            found = _difference(known.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if known == wanted else (name, known, wanted)
