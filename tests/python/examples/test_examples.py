"""The examples run, those in Python on the untrained model that they make; the one in C++ builds as a user's would."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from paths import ROOT

import diffqkv

EXAMPLES = ROOT / "examples"
SCRIPTS = EXAMPLES / "python"

# What each script must print, those that read a checkpoint of the untrained model of checkpoint.py.
PRINTED = {
    "ablate": r"(?s)MHA +8/8/8 .*few K, augmented Q +8/2/8 +853,376 +1,920 +\d\.\d{3}\n",
    "batch": "as alone: True",
    "chat": r"\d\d tokens are cached, in 2 layers of CacheShape\(n_k=2, d_k=16, n_v=4, d_v=16\)",
    "paged_cache": r"\[74, 304, 37\] tokens in 15 pages\nlargest error \d\.\de-0[67]\n100 rows of V",
    "prefix": "the 70 tokens of the prefix were computed once",
    "speculative": r"(?s)prompt lookup: \d+ forward passes, the same tokens: True\n.*one layer: .* tokens: True",
}
CHECKPOINTS = {"batch", "chat", "prefix", "speculative"}  # that read one
ARGUMENTS = {"ablate": ["2"]}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp_example(tmp_path):
    prefixes = f"{torch.utils.cmake_prefix_path};{diffqkv.cmake_prefix_path}"
    configure = ["cmake", "-S", str(EXAMPLES / "cpp"), "-B", str(tmp_path), f"-DCMAKE_PREFIX_PATH={prefixes}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)], [str(tmp_path / "decode")]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "decode_attention [1, 32, 1, 64]" in result.stdout


@pytest.mark.parametrize("name", PRINTED)
def test_python_example(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # without the model of the demo
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *ARGUMENTS.get(name, ())])
    lines = iter(["hello", "more", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert ("an untrained model answers with noise" in printed) == (name in CHECKPOINTS)
    assert re.search(PRINTED[name], printed), printed


def test_an_example_takes_a_checkpoint(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["batch.py", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="checkpoint: got .*model, want a folder that save_pretrained wrote"):
        runpy.run_path(str(SCRIPTS / "batch.py"), run_name="__main__")
    checkpoint = runpy.run_path(str(SCRIPTS / "checkpoint.py"))
    monkeypatch.setattr(sys, "argv", ["batch.py"])
    monkeypatch.chdir(tmp_path)
    for part in checkpoint["load"]():
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["batch.py", str(tmp_path / "model")])
    capsys.readouterr()
    runpy.run_path(str(SCRIPTS / "batch.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "untrained" not in printed and "as alone: True" in printed


def test_every_python_example_is_tested():
    # Read by the others; test_convert.py, test_demo.py, test_evaluation.py.
    elsewhere = {"checkpoint", "recover_conversion", "demo", "evaluation"}
    assert {path.stem for path in SCRIPTS.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"} == (
        PRINTED.keys() | elsewhere
    )
