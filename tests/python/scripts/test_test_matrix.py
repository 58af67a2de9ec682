"""scripts/test_matrix.py: the releases it means, what it reads off pytest's reports, and its exit code."""

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from paths import ROOT

from diffqkv._version import OLDEST_TRANSFORMERS

SCRIPT = ROOT / "scripts" / "test_matrix.py"
TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="in vain")
def test_skips():
    pass

def test_fails():
    assert {fails} != 1
"""


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("test_matrix_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def outcome_of(script, folder, fails):
    test = folder / "test_three.py"
    test.write_text(TESTS.format(fails=int(fails)))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--junitxml={report}", str(test)]
    return script.read(report, subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode)


def test_releases(script):
    assert script.release("transformers", "oldest") == OLDEST_TRANSFORMERS
    assert script.release("torch", "oldest") == "2.11"
    assert script.release("transformers", "5.20.0") == "5.20.0"


def test_the_installed_transformers_is_not_installed_again(script, monkeypatch):
    monkeypatch.setattr(script, "pip", None)
    environment = script.with_transformers(version("transformers"))
    assert (Path(environment.folder) / "transformers" / "__init__.py").exists()


def test_reports(script, tmp_path):
    good = outcome_of(script, tmp_path, fails=False)
    assert (good.code, good.passed, good.failed, dict(good.skips)) == (0, 2, 0, {"in vain": 1})
    bad = outcome_of(script, tmp_path, fails=True)
    assert (bad.code, bad.passed, bad.failed, dict(bad.skips)) == (1, 1, 1, {"in vain": 1})
    # A run without a report came to no end.
    assert script.read(tmp_path / "absent.xml", -11) == script.Outcome(-11)
    lines = script.table({"a": good, "b": bad, "c": script.Outcome(-11)}).splitlines()
    assert [line.split("|")[1:5] for line in lines[2:5]] == [
        [" a ", " 2 ", " 0 ", " 1 "],
        [" b ", " 1 ", " 1 ", " 1 "],
        [" c ", " 0 ", " 0 ", " 0 "],
    ]
    assert lines[5:] == ["skipped with a: 1 x in vain", "skipped with b: 1 x in vain"]


@pytest.mark.parametrize(("codes", "want"), [([0, 0], 0), ([0, 1], 1), ([0, -11], 1), ([5, 0], 1)])
def test_the_worst_outcome_is_the_exit_code(script, monkeypatch, codes, want):
    seen = []

    def run(environment, others, arguments):
        seen.append((environment.folder, others, arguments))
        return script.Outcome(codes[len(seen) - 1])

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "with_transformers", lambda name: script.Environment(name, "python", f"at/{name}"))
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", "--transformers", "1 2", "-k", "cache"])
    assert script.main() == want
    assert seen == [("at/1", ["at/2"], ["-k", "cache"]), ("at/2", ["at/1"], ["-k", "cache"])]


def test_what_a_broken_installation_left_is_begun_anew(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "MATRIX", tmp_path)
    folder = tmp_path / "transformers-1"
    folder.mkdir()
    (folder / "half").touch()
    installed = []

    def install():
        assert not (folder / "half").exists()
        folder.mkdir()
        installed.append(folder)

    for _ in range(2):
        script.install_once(folder, 1, install)
    assert installed == [folder]
    with pytest.raises(SystemExit, match=f"MB of disk space left, {10**9} MB needed for transformers-2"):
        script.install_once(tmp_path / "transformers-2", 10**9, install)
