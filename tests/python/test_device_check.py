"""benchmarks/device_check.py where there is no GPU: that it passes, fails and reports as it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffqkv import _library

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("library")


def device_check(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "device_check.py"), "--library", str(_library.path), "--out", str(out)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=250)


def test_dry_run(tmp_path):
    run = device_check(tmp_path, "--device", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert report["passed"] and report["dry_run"]
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {
        "environment": "passed",
        "correctness": "passed",
        "repeat": "passed",
    }
    assert report["stages"]["correctness"]["cases"] > 200
    assert "Device check: passed" in (tmp_path / "device_check.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"device_check.json", "device_check.md"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(tmp_path):
    run = device_check(tmp_path)
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
    assert not json.loads((tmp_path / "device_check.json").read_text())["passed"]


def test_time_limit_is_a_failure(tmp_path):
    run = device_check(tmp_path, "--device", "cpu", "--time-limit", "1")
    assert run.returncode == 1
    assert json.loads((tmp_path / "device_check.json").read_text())["stages"]["correctness"]["status"] == "skipped"


def shifted_heads(op, k_cache, v_cache, k, v, positions, **options):
    op(k_cache, v_cache, k.roll(1, dims=1), v, positions, **options)


def forgotten_stats(op, *tensors, v_stats, **options):
    op(*tensors, v_stats=None, **options)


def overrun(op, k_cache, v_cache, *tensors, **options):
    op(k_cache, v_cache, *tensors, **options)
    elements = v_cache.untyped_storage().nbytes() // v_cache.itemsize
    v_cache.as_strided((1,), (1,), elements - 1).zero_()  # the last one: a gap, or a slot of another token


@pytest.mark.parametrize("broken", [shifted_heads, forgotten_stats, overrun])
def test_a_wrong_kernel_is_found(broken, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from device_stages.context import Context
    from device_stages.correctness import correctness

    context = Context(Path(_library.path), "cpu", lambda result: None)
    op = context.load_op()
    monkeypatch.setattr(context, "load_op", lambda: lambda *tensors, **options: broken(op, *tensors, **options))
    correctness(context)
    context.finish()
    assert context.result["status"] == "failed"
    assert len(context.failures) > 30
