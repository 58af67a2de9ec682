"""Runs the Python tests with the oldest and the newest transformers, and those of the ops with other releases of torch.

`make test-matrix` runs it in the environment of the tests. What that lacks goes to build/matrix and stays there: a
folder with transformers and its requirements, a virtual environment per torch. Arguments unknown here go to pytest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "build" / "matrix"
# What needs nothing but torch: the binary contract, the ops, what torch is told of them.
TORCH_TESTS = ["project/test_load_matrix.py", "ops/test_ops.py", "ops/test_layer_ops.py", "project/test_contract.py"]
TORCH_PACKAGES = ["numpy", "psutil", "pytest", "pytest-timeout", "setuptools"]
TRANSFORMERS_MB, TORCH_MB = 1_000, 12_000


class Environment(NamedTuple):
    """What one row of the table runs in; `folder` is where its transformers lies."""

    name: str
    python: str
    folder: str = ""
    tests: tuple[str, ...] = ()


class Outcome(NamedTuple):
    code: int
    passed: int = 0
    failed: int = 0
    skips: Counter[str] = Counter()
    seconds: float = 0.0


def pip(*arguments: str, python: str = sys.executable) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"test-matrix: pip {' '.join(arguments)} failed, see above; what is installed stays for the next run")
    return done.stdout


def release(package: str, wanted: str) -> str:
    """The release that is meant: "oldest" is the least that pyproject.toml asks for, "newest" pip's choice of today."""
    if wanted == "oldest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = map(Requirement, project["dependencies"] + project["optional-dependencies"]["hf"])
        (specifiers,) = (requirement.specifier for requirement in needed if requirement.name == package)
        (oldest,) = (specifier.version for specifier in specifiers if specifier.operator == ">=")
        return oldest
    if wanted != "newest":
        return wanted
    report = pip("install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report=-", package)
    return json.loads(report)["install"][0]["metadata"]["version"]


def install_once(folder: Path, needed_mb: int, install) -> None:
    """Installs into the folder, unless an earlier run did; what a broken run left is begun anew."""
    complete = folder / ".complete"
    if complete.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    MATRIX.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(MATRIX).free // 2**20
    if free_mb < needed_mb:
        sys.exit(f"test-matrix: {free_mb} MB of disk space left, {needed_mb} MB needed for {folder.name}")
    print(f"installing {folder.name}", flush=True)
    install()
    complete.touch()


def with_transformers(wanted: str) -> Environment:
    number = release("transformers", wanted)
    if Version(number) == Version(version("transformers")):
        folder = Path(sysconfig.get_path("purelib"))
    else:
        folder = MATRIX / f"transformers-{number}"
        arguments = ("install", "--quiet", "--target", str(folder), f"transformers=={number}")
        install_once(folder, TRANSFORMERS_MB, lambda: pip(*arguments))
    return Environment(f"transformers {number}", sys.executable, str(folder))


def with_torch(wanted: str) -> Environment:
    number = release("torch", wanted)
    folder = MATRIX / f"torch-{number}"
    python = str(folder / "bin" / "python")

    def install() -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip("install", "--quiet", f"torch=={number}", *TORCH_PACKAGES, python=python)

    install_once(folder, TORCH_MB, install)
    return Environment(f"torch {number}", python, tests=tuple(f"tests/python/{name}" for name in TORCH_TESTS))


def read(report: Path, code: int) -> Outcome:
    """What pytest says in its JUnit file; without one it came to no end."""
    if not report.exists():
        return Outcome(code)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    skips = Counter(skip.get("message") for skip in suite.iter("skipped"))
    return Outcome(code, total - failures - errors - skipped, failures + errors, skips, float(suite.get("time")))


def run(environment: Environment, others: list[str], arguments: list[str]) -> Outcome:
    stem = MATRIX / environment.name.replace(" ", "-")
    report, log = stem.with_name(stem.name + ".xml"), stem.with_name(stem.name + ".log")
    MATRIX.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    path = [environment.folder, str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "DIFFQKV_TEST_TRANSFORMERS": os.pathsep.join(others),
    }
    command = [environment.python, "-m", "pytest", f"--junitxml={report}", *environment.tests, *arguments]
    print(f"{environment.name}: {log.relative_to(ROOT)}", flush=True)
    with log.open("w") as out:
        code = subprocess.run(command, cwd=ROOT, env=variables, stdout=out, stderr=out, check=False).returncode
    return read(report, code)


def table(outcomes: dict[str, Outcome]) -> str:
    """One line per environment, and why tests were left out that others ran."""
    lines = ["| with | passed | failed | skipped | seconds | exit code |", "|---|---|---|---|---|---|"]
    for name, (code, passed, failed, skips, seconds) in outcomes.items():
        lines.append(f"| {name} | {passed} | {failed} | {skips.total()} | {seconds:.0f} | {code} |")
    everywhere = Counter(next(iter(outcomes.values())).skips)
    for outcome in outcomes.values():
        everywhere &= outcome.skips
    for name, outcome in outcomes.items():
        lines += [f"skipped with {name}: {count} x {why}" for why, count in (outcome.skips - everywhere).items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--transformers", default="oldest newest", help="releases, with spaces between")
    parser.add_argument("--torch", default="", help="the same: the tests of the ops alone")
    options, arguments = parser.parse_known_args()
    environments = [with_transformers(wanted) for wanted in options.transformers.split()]
    folders = [environment.folder for environment in environments]
    environments += [with_torch(wanted) for wanted in options.torch.split()]
    outcomes = {}
    for environment in environments:
        others = [folder for folder in folders if folder != environment.folder] if environment.folder else []
        outcomes[environment.name] = run(environment, others, arguments)
    print(table(outcomes))
    return int(any(outcome.code for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
