"""scripts/argument_lists.py: what it takes for a list, and how many there are."""

import importlib.util
import subprocess
import sys

import pytest
from paths import ROOT

UPDATE = ("k_cache", "v_cache", "k", "v", "positions", "cos", "sin", "block_table")
SCRIPT = ROOT / "scripts" / "argument_lists.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("argument_lists", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("x.py", "def f(dout, dlse, q, k, v, out, lse): ...", [(1, "backward tensors")]),
        ("x.py", "\nf(\n  dout, dlse, q,\n  k, v, out)", [(2, "backward tensors")]),  # six of seven
        ("x.py", "f(dout, dlse, q, k, v)", []),
        ("x.py", "f(dout, dlse, q, (k, v, out, lse))", []),  # a group in a group
        ("x.py", '"""f(dout, dlse, q, k, v, out, lse)"""  # f(dout, dlse, q, k, v, out, lse)', []),
        ("x.py", "class X(NamedTuple):\n" + "".join(f"    {name}: int\n" for name in UPDATE), [(1, "kv_cache_update")]),
        ("x.h", "struct X { int dout, dlse, q, k, v, out, lse; };  // (dout, dlse, q, k, v, out, lse)",
         [(1, "backward tensors")]),
        ("x.cpp", "#define LIST \\\n  dout, dlse, q, \\\n  k, v, out, lse\n", [(1, "backward tensors")]),
    ],
)  # fmt: skip
def test_lists(script, tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert list(script.lists(tmp_path / name)) == found


def test_argument_lists_stay_few():
    run = subprocess.run([sys.executable, SCRIPT, "--most", "40"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert int(run.stdout.rsplit(": ", 1)[1].split()[0]) > 10  # it found the sources


def test_more_than_the_most_fail():
    assert subprocess.run([sys.executable, SCRIPT, "--most", "3"], capture_output=True).returncode == 1
