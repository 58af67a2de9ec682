"""Transformers' own linter on our model files, save for the rules that only files inside of transformers can follow."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXEMPT = {
    "TRF028": "a licence header of ten lines: ours is an SPDX line",
    "TRF057": "auto_docstring: it knows the configurations of transformers alone, and prints errors about others",
}
FOLDER = Path(__file__).parents[1] / "python/diffqkv/models/sigma"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "findings.json")
        command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--output-json", report, FOLDER]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            print(done.stdout + done.stderr, file=sys.stderr)
            return 1
        findings = [x for x in json.loads(report.read_text())["findings"] if x["rule"] not in EXEMPT]
    for finding in findings:
        print(f"{finding['path']}:{finding['line']}: {finding['message']}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
