"""A short random campaign of every op, which `make fuzz` runs for long; a failure prints the line that repeats it."""

import sys

import pytest
import torch
from fuzz.__main__ import main
from fuzz.calls import OPS, run
from fuzz.draw import Draw

import diffqkv

CALLS = 60


@pytest.mark.parametrize("op", OPS)
def test_random_calls(library, op, capsys):
    wrong = main(["--op", op, "--seed", "0", "--calls", str(CALLS), "--processes", "2"])
    printed = capsys.readouterr().out
    assert f"{op}: {CALLS} calls" in printed and not wrong, printed


# ---- the campaign finds faults ---------------------------------------------------------------------------------------


def scaled(x: torch.Tensor) -> torch.Tensor:
    """x with one element wrong by a few units of the last place of its dtype."""
    x = x.clone()
    if x.numel():
        x.flatten()[-1] *= 1 + 8 * torch.finfo(x.dtype).eps
    return x


def without(name: str):
    def wrapper(op, *args, **options):
        return op(*args, **{key: x for key, x in options.items() if key != name})

    return wrapper


def last_element(op, *args, **options):
    out = op(*args, **options)
    return (scaled(out[0]), *out[1:]) if isinstance(out, tuple) else scaled(out)


def one_less(name: str):
    def wrapper(op, *args, **options):
        if isinstance(options.get(name), torch.Tensor):
            options[name] = (options[name] - 1).clamp_min(0)
        return op(*args, **options)

    return wrapper


def accepts_anything(op, *args, **options):
    try:
        return op(*args, **options)
    except (ValueError, TypeError):
        return None


def beside_the_tokens(op, *args, **options):
    op(*args, **options)
    v_cache = options["v_cache"]
    if v_cache.numel():
        v_cache[0, 0, 0, 0, 0] = 1.0


def rounded_to_int8(op, x, *args, **options):
    """x of integer weights in 8 bits instead of 16."""
    if options.get("scales") is not None:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        x = (scale * (x / scale).round()).to(x.dtype)
    return op(x, *args, **options)


FAULTS = [
    *[(op, accepts_anything) for op in OPS],
    *[(op, last_element) for op in OPS if op != "kv_cache_update"],
    *[(op, without("softmax_scale")) for op in OPS if "attention" in op],
    *[(op, without("window")) for op in ("flash_attention", "flash_attention_varlen", "decode_attention")],
    *[(op, one_less("kv_end")) for op in ("flash_attention", "flash_attention_varlen")],
    *[(op, one_less("cache_seqlens")) for op in ("decode_attention", "selective_v_attention")],
    *[("selective_v_attention", without(name)) for name in ("tail", "keep_last", "max_error")],
    *[("kv_cache_update", without("v_stats")), ("kv_cache_update", beside_the_tokens)],
    *[("packed_linear", without("zeros")), ("packed_linear", without("bias")), ("packed_linear", rounded_to_int8)],
]


@pytest.mark.parametrize(("op", "fault"), FAULTS, ids=lambda x: getattr(x, "__qualname__", x))
def test_faults_are_found(library, monkeypatch, op, fault):
    right = getattr(diffqkv, op)
    monkeypatch.setattr(diffqkv, op, lambda *args, **options: fault(right, *args, **options))
    for seed in range(1000):
        try:
            run(op, seed)
        except AssertionError as error:
            assert error.__notes__[0].startswith("the call: ")
            return
    pytest.fail(f"1000 calls of a wrong {op} look right")


@pytest.mark.parametrize("op", OPS)
def test_a_seed_is_one_call(op):
    a, b, other = (Draw(op, seed) for seed in (7, 7, 8))
    drawn = [[d.integer(0, 10**9), d.heads(16), d.tensor(3).tolist()] for d in (a, b, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_process_that_dies_is_a_find(monkeypatch, tmp_path, capsys):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nread call\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    assert main(["--op", "swiglu", "--seed", "3", "--calls", "2", "--processes", "1"]) == 1
    printed = capsys.readouterr().out
    for seed in (3, 4):
        assert f"--op swiglu --seed {seed}\n  the process died: SIGSEGV\n" in printed
    assert "swiglu: 2 calls" in printed and "2 wrong" in printed
