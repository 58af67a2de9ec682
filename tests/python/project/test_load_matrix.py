"""One library file runs in every torch release at hand: DIFFQKV_TEST_PYTHONS lists interpreters, with colons."""

import os
import subprocess
import sys

import pytest
from paths import SUPPORT

from diffqkv.ops import library as compiled

INTERPRETERS = [sys.executable, *filter(None, os.environ.get("DIFFQKV_TEST_PYTHONS", "").split(":"))]


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_every_op_runs(interpreter):
    command = [interpreter, str(SUPPORT / "smoke.py"), compiled.path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "every op ran" in result.stdout
