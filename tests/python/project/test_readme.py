"""The README's examples run as printed, one after another as a reader would type them."""

import re
import shutil

import pytest
from paths import ROOT

from diffqkv.ops import dispatch

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(capsys, monkeypatch, tmp_path):
    assert len(BLOCKS) == 7, "one example for each kind of user"
    # The reader's own text.
    (tmp_path / "corpus").mkdir()
    for path in (ROOT / "python" / "diffqkv").glob("*.py"):
        shutil.copy(path, tmp_path / "corpus" / f"{path.stem}.txt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "diffqkv::flash_attention" in printed
    assert "4 16 3072" in printed
    assert "tensor(True)" in printed
    assert "torch.Size([1, 256, 32, 128])" in printed and "torch.Size([1, 1, 32, 128])" in printed


def test_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_no_kernel_is_claimed_to_run_on_a_gpu_that_has_not():
    rows = re.findall(r"^\| (`\w+`.*?) \| kernel, tested \| (.+) \|$", README, re.MULTILINE)
    named = {op: cell for ops, cell in rows for op in re.findall(r"`(\w+)`", ops)}
    assert set(named) == set(dispatch.OPS)
    for op, cell in named.items():
        assert ("compiled, not run on a GPU" in cell) == (op not in dispatch.CUDA_TESTED), op


def test_settings_are_read_somewhere():
    sources = "\n".join(
        path.read_text()
        for folder in ("csrc", "python", "cmake")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".py", ".cmake"} and "share" not in path.parts
    )
    sources += (ROOT / "setup.py").read_text() + (ROOT / "CMakeLists.txt").read_text()
    for name in re.findall(r"`((?:DIFFQKV|CMAKE)_\w+)", README):
        assert name in sources, name


def test_speed_table_is_that_of_the_committed_run():
    assert (ROOT / "benchmarks" / "results" / "bench_zen5.md").read_text() in README
