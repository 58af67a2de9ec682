"""`make test-flash-attn`: a small stand-in for FlashAttention's test file runs, counts, and can fail."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from paths import ROOT

SCRIPT = ROOT / "scripts" / "flash_attn_tests.py"
PADDING = "def unpad_input(x):\n    return x.flatten(0, 1)\n"
TESTS = """
import math
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import unpad_input
from flash_attn.flash_attn_interface import _get_block_size_n
from flash_attn.layers.rotary import apply_rotary_emb

is_sm80 = torch.cuda.get_device_capability("cuda") == (8, 0)

@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("seqlen", [16, 24, 512])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_output(seqlen, alibi, dropout_p):
    assert is_sm80 and not alibi and seqlen < 512
    q, k, v = (torch.randn(2, seqlen, 3, 20, device="cuda") for _ in range(3))
    out, lse, s_dmask = flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(20)
    weights = scores.softmax(-1)
    if dropout_p:
        (block,) = scores.split(_get_block_size_n("cuda", 20, True, False), dim=-1)
        exact = s_dmask.abs() * (block.amax(-1) - lse).exp()[..., None]
        torch.testing.assert_close(exact, weights)
        weights = torch.where(s_dmask >= 0, weights, 0) / (1 - dropout_p)
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", weights, v))

@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    x, angle, offsets = torch.randn(2, 3, 1, 8), torch.rand(9, 2), torch.tensor([5, 0])
    out = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved=interleaved, seqlen_offsets=offsets)
    first, second = (0, 1) if interleaved else (0, 2)
    turn = angle[6, 0]  # token 1 of entry 0
    want = x[0, 1, 0, first] * turn.cos() - x[0, 1, 0, second] * turn.sin()
    torch.testing.assert_close(out[0, 1, 0, first], want)
    assert torch.equal(out[..., 4:], x[..., 4:])

def test_skips_itself():
    assert unpad_input(torch.ones(2, 3)).shape == (6,)
    pytest.skip("not for a reason of ours")

def test_flash_attn_generator_arg_must_be_none():
    assert False
"""


def run(source, *options):
    command = [sys.executable, str(SCRIPT), str(source), *options]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def checkout(tmp_path):
    for name, text in (("tests/test_flash_attn.py", TESTS), ("flash_attn/bert_padding.py", PADDING)):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path / "checkout"


def test_counts_and_reasons(checkout):
    done = run(checkout, "--sample", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.partition("6 passed, 0 failed, 10 left out:\n")[2].splitlines()
    assert sorted(line.split(maxsplit=1) for line in lines) == [
        ["1", "calls the C++ extension"],
        ["1", "the file itself: not for a reason of ours"],
        ["2", "more than 65536 scores per head, for a CPU"],
        ["6", "ALiBi is not built"],
    ]


def test_a_failure_fails(checkout):
    path = checkout / "tests" / "test_flash_attn.py"
    path.write_text(path.read_text().replace("dropout_p, return_attn_probs", "dropout_p, 0.3, return_attn_probs"))
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    path.unlink()  # what is committed counts
    done = run(checkout, "--ref", "HEAD", "--sample", "0")
    assert done.returncode == 1 and "2 passed, 4 failed, 10 left out:" in done.stdout, done.stdout + done.stderr


def test_a_sample_is_drawn_by_its_seed():
    spec = importlib.util.spec_from_file_location("flash_attn_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def drawn(seed):
        items = [SimpleNamespace(originalname="test_output", number=n) for n in range(100)]
        sample = module.Sample(10, seed, 65536)
        sample.pytest_collection_modifyitems(items)
        assert sample.left_out == {"not in the sample": 90}
        return [item.number for item in items]

    assert len(set(drawn(1))) == 10 and drawn(1) == sorted(drawn(1)) == drawn(1) != drawn(2)


def test_a_wrong_source_is_one_sentence(checkout):
    done = run(checkout.parent / "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("flash_attn_tests: ") and "Traceback" not in done.stderr
