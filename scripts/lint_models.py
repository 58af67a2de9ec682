"""Transformers' own linter on our model files, save for the rules that only files inside of transformers can follow."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXEMPT = {
    "TRF028": "a licence header of ten lines: ours is an SPDX line",
    "TRF057": "auto_docstring: it knows the configurations of transformers alone, and prints errors about others",
}
FOLDER = Path(__file__).parents[1] / "python/diffqkv/models/sigma"
PREFIXES = ("configuration_", "modeling_")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Most rules look at files of these names alone; the parts of the model in others shall follow them too.
        files = {}
        for file in FOLDER.glob("*_sigma.py"):
            copy = Path(folder, file.name if file.name.startswith(PREFIXES) else f"modeling_{file.name}")
            files[copy.name] = file
            shutil.copy(file, copy)
        report = Path(folder, "findings.json")
        command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--output-json", report, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            print(done.stdout + done.stderr, file=sys.stderr)
            return 1
        findings = [x for x in json.loads(report.read_text())["findings"] if x["rule"] not in EXEMPT]
    for finding in findings:
        print(f"{files[Path(finding['path']).name]}:{finding['line']}: {finding['message']}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
