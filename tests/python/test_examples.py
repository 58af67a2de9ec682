"""The C++ example builds against LibTorch and the installed package, and gets torch's result."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import diffqkv

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp_example(tmp_path):
    prefixes = f"{torch.utils.cmake_prefix_path};{diffqkv.cmake_prefix_path}"
    configure = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), f"-DCMAKE_PREFIX_PATH={prefixes}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)], [str(tmp_path / "decode")]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "decode_attention [1, 32, 1, 64]" in result.stdout
