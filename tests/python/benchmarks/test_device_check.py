"""benchmarks/device_check.py where there is no GPU: that it passes, fails and reports as it says."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import WITHOUT_CUDA_KERNEL
from paths import PACKAGE, ROOT

from diffqkv import reference
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled

BENCHMARKS = ROOT / "benchmarks"
OPS = {*dispatch.OPS, *dispatch.BACKWARD.values()} - WITHOUT_CUDA_KERNEL
DECIDING = ("smoke", "correctness", "stability", "large")
SPEED = (
    "decode_attention", "flash_attention", "flash_attention_backward", "selective_v_attention", "kv_cache_update",
    "swiglu",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def device_check(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "device_check.py"), "--library", str(compiled.path), "--out", str(out)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=250)


def test_dry_run(tmp_path):
    """opcheck, of which all ops have their own tests, is left out: it takes as long as all the rest."""
    run = device_check(tmp_path, "--device", "cpu", "--steps", *DECIDING, *SPEED)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("planned: ")
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert report["passed"] and report["dry_run"] and set(report["ready"]) == OPS
    assert report["environment"]["library"] == str(compiled.path)
    steps = report["steps"]
    assert set(steps) == {"environment", *DECIDING, *SPEED}
    assert {job["status"] for step in steps.values() for job in step["jobs"].values()} == {"passed"}
    assert all(set(steps[step]["jobs"]) == OPS for step in DECIDING)
    assert sum(job["cases"] for job in steps["correctness"]["jobs"].values()) > 200
    assert all(job["repetitions"] and job["entries_alone"] for job in steps["stability"]["jobs"].values())
    for op in SPEED:
        rows = steps[op]["jobs"]["all"]["rows"]
        assert len(rows) >= 2 and all(row["case"].startswith(op) and row["ms"]["ours"] > 0 for row in rows)
        assert all(row["rate"]["per_second"] > 0 and row["ratios"]["of limit"] > 0 for row in rows)
    assert all("Sigma / own GQA-16" in row["ratios"] for row in steps["decode_attention"]["jobs"]["all"]["rows"])
    text = (tmp_path / "device_check.md").read_text()
    assert "Device check: passed" in text and "says nothing about a GPU" in text and "## flash_attention" in text
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
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert not report["passed"] and report["steps"]["environment"]["jobs"]["all"]["status"] == "skipped"


def test_the_plan_fits_into_ten_minutes():
    from device_check import OPS as KNOWN
    from device_check import STEPS

    assert set(KNOWN) == OPS
    assert sum(step.planned for step in STEPS) < 570
    assert [step.name for step in STEPS][:3] == ["environment", "smoke", "correctness"]
    assert all(step.limit >= step.planned for step in STEPS)


# ---- processes -------------------------------------------------------------------------------------------------------

_MODULE = """
import os, signal, time

def good(context):
    context.result["found"] = 1

def crash(context):
    context.result["found"] = 2
    context.save()
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(context):
    context.fail("so far")
    time.sleep(1000)

def error(context):
    raise KeyError("no such thing")
"""


def test_neither_a_crash_nor_a_hang_takes_the_others_along(tmp_path, monkeypatch):
    from gpu.jobs import Job, run

    (tmp_path / "unruly.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (BENCHMARKS, PACKAGE))))
    results = {}

    def run_all(names, limit):
        start = time.monotonic()
        jobs = [Job(name, "unruly", name, ()) for name in names]
        run(jobs, "cpu", tmp_path, limit, 2, lambda job, result: results.update({job.name: result}))
        return time.monotonic() - start

    usual = run_all(["good"], 200)  # imports torch once for all
    run_all(["hang", "crash", "error", "good"], max(4, 3 * usual))
    assert {name: result["status"] for name, result in results.items()} == {
        "hang": "timeout",
        "crash": "error",
        "error": "error",
        "good": "passed",
    }
    assert results["hang"]["failures"] == ["so far"] and "not finished" in results["hang"]["reason"]
    assert results["crash"]["found"] == 2 and "signal 11" in results["crash"]["reason"]
    assert "no such thing" in results["error"]["reason"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---- wrong kernels ---------------------------------------------------------------------------------------------------


def break_op(name, broken, monkeypatch):
    from gpu import context
    from gpu.context import Context

    real = Context.op

    def op(self, asked):
        return partial(broken, real(self, asked)) if asked == name else real(self, asked)

    monkeypatch.setattr(Context, "op", op)
    monkeypatch.setattr(context, "_TOO_MANY", 2)  # enough


def run_check(check, name, monkeypatch, broken=None):
    """The context after a check whose op, if it is broken, does other things: broken(op, **arguments)."""
    from gpu import checks
    from gpu.context import Context

    if broken is not None:
        break_op(name, broken, monkeypatch)
    context = Context("cpu", lambda result: None)
    context.run(getattr(checks, check), name)
    return context


def other_head(op, **args):
    """V of the neighbour."""
    x = "v" if "v" in args else "v_cache"
    heads = {3: 1, 4: 1, 5: 3}[args[x].dim()]
    return op(**args | {x: args[x].roll(1, dims=heads if args[x].shape[heads] > 1 else 1)})


def no_padding(op, **args):
    return op(**args | {"kv_start": None, "kv_end": None})


def not_causal(op, **args):
    return op(**args | {"causal": False})


def no_window(op, **args):
    return op(**args | {"window_left": -1})


def no_start(op, **args):
    return op(**args | {"cache_start": None})


def no_softcap(op, **args):
    return op(**args | {"softcap": 0.0})


def other_dropout(op, **args):
    return op(**args | {"seed": args["seed"] + 1})


def no_dropout(op, **args):
    return op(**args | {"dropout_p": 0.0})


def lost_lse(op, **args):
    out, lse, *rest = op(**args)
    return out, torch.zeros_like(lse), *rest


def lse_of_base_two(op, **args):
    out, lse, *rest = op(**args)
    return out, lse * 1.442695, *rest


def out_of_another_dtype(op, **args):
    out, *rest = op(**args)
    return out.float() if out.dtype != torch.float32 else out.half(), *rest


def imprecise(op, **args):
    out, *rest = op(**args)
    return out * (1 + 8 * torch.finfo(out.dtype).eps), *rest


def gradient(index):
    def lost(op, **args):
        results = list(op(**args))
        results[index] = results[index] * 1.05
        return results

    return lost


def no_dlse(op, **args):
    return op(**args | {"dlse": None})


def one_fewer(op, **args):
    return op(**args | {"top_k": max(1, args["top_k"] - 1)})


def latest_of_ties(op, **args):
    """By index descending: the cache backwards."""
    out, lse, mass, indices, *rest = op(**args)
    return out, lse, mass, (indices + 1).where(indices == indices.amax(-1, keepdim=True), indices), *rest


def only_drop(op, **args):
    return op(**args | {"tail": 0})


def bound_of_nothing(op, **args):
    *results, bound = op(**args)
    return *results, bound.where(bound.isinf(), 0.0)


def nothing_forced(op, **args):
    return op(**args | {"keep_first": 0, "keep_last": 0})


def shifted_heads(op, **args):
    op(**args | {"k": args["k"].roll(1, dims=1)})


def forgotten_stats(op, **args):
    op(**args | {"v_stats": None})


def overrun(op, **args):
    op(**args)
    v_cache = args["v_cache"]
    elements = v_cache.untyped_storage().nbytes() // v_cache.itemsize
    v_cache.as_strided((1,), (1,), elements - 1).zero_()  # the last one: a gap, or a slot of another token


def not_gated(op, **args):
    return op(gate=args["up"], up=args["gate"])


def swapped(op, **args):
    return op(**args)[::-1]


WRONG = [
    ("flash_attention", other_head),
    ("flash_attention", no_padding),
    ("flash_attention", not_causal),
    ("flash_attention", no_window),
    ("flash_attention", no_softcap),
    ("flash_attention", other_dropout),
    ("flash_attention", lost_lse),
    ("flash_attention", lse_of_base_two),
    ("flash_attention", out_of_another_dtype),
    ("flash_attention", imprecise),
    ("flash_attention_varlen", other_head),
    ("flash_attention_varlen", not_causal),
    ("flash_attention_varlen", no_padding),
    ("flash_attention_backward", gradient(0)),
    ("flash_attention_backward", gradient(1)),
    ("flash_attention_backward", gradient(2)),
    ("flash_attention_backward", gradient(3)),
    ("flash_attention_backward", no_dlse),
    ("flash_attention_backward", no_dropout),
    ("flash_attention_varlen_backward", gradient(1)),
    ("flash_attention_varlen_backward", no_dropout),
    ("decode_attention", other_head),
    ("decode_attention", no_start),
    ("decode_attention", no_window),
    ("decode_attention", lost_lse),
    ("selective_v_attention", other_head),
    ("selective_v_attention", one_fewer),
    ("selective_v_attention", latest_of_ties),
    ("selective_v_attention", only_drop),
    ("selective_v_attention", bound_of_nothing),
    ("selective_v_attention", nothing_forced),
    ("selective_v_attention", lost_lse),
    ("kv_cache_update", shifted_heads),
    ("kv_cache_update", forgotten_stats),
    ("kv_cache_update", overrun),
    ("swiglu", not_gated),
    ("swiglu_backward", swapped),
]


@pytest.mark.parametrize("name, broken", WRONG, ids=[f"{x}-{y.__qualname__.split('.')[0]}" for x, y in WRONG])
def test_a_wrong_kernel_is_found(name, broken, monkeypatch):
    context = run_check("correctness", name, monkeypatch, broken)
    assert context.result["status"] == "failed" and context.failures


class Wavering:
    """Another last bit in every third call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, op, **args):
        results = op(**args)
        self.calls += 1
        for x in (results,) if isinstance(results, torch.Tensor) else results or (args["v_cache"],):
            if self.calls % 3 == 0 and x.is_floating_point() and x.numel():
                x.view(torch.uint8).view(-1)[:1] ^= 1
        return results


def depends_on_the_batch(op, **args):
    results = op(**args)
    first = next(args[x] for x in ("cu_seqlens_q", "q", "k", "gate") if x in args)
    several = len(first) > (2 if "cu_seqlens_q" in args else 1)
    for x in (results,) if isinstance(results, torch.Tensor) else results or (args["v_cache"],):
        if several and x.is_floating_point():
            x.mul_(1.01)
    return results


@pytest.mark.parametrize("kind", ["wavering", "batch"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_other_bits_are_found(name, kind, monkeypatch):
    context = run_check("stability", name, monkeypatch, Wavering() if kind == "wavering" else depends_on_the_batch)
    assert context.result["status"] == "failed"
    assert any(("repetitions differ" if kind == "wavering" else "alone") in failure for failure in context.failures)


@pytest.mark.parametrize("name", sorted(OPS))
def test_offsets_of_few_bits_are_found(name, monkeypatch):
    """Strides, or numbers of elements, as a kernel sees them that counts in too short integers."""

    def short(op, **args):
        for x in ("k", "k_cache", "gate"):
            if isinstance(args.get(x), torch.Tensor):
                if max(args[x].stride()) > 2**18 or x == "gate" and args[x].numel() > 2**18:
                    args[x] = args[x] + 1
                break
        return op(**args)

    context = run_check("large", name, monkeypatch, short)
    assert context.result["status"] == "failed"


def test_a_kernel_that_raises_is_found(monkeypatch):
    def raising(op, **args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    context = run_check("correctness", "decode_attention", monkeypatch, raising)
    assert context.result["status"] == "failed" and "illegal memory access" in context.failures[0]


def test_opcheck_finds_a_wrong_fake_kernel(monkeypatch):
    assert run_check("contract", "swiglu", monkeypatch).result == {"opchecks": 4, "status": "passed"}
    monkeypatch.setattr(torch.library, "opcheck", lambda *args: (_ for _ in ()).throw(AssertionError("other strides")))
    context = run_check("contract", "swiglu", monkeypatch)
    assert context.result["status"] == "failed" and "other strides" in context.failures[0]


# ---- what only a GPU runs --------------------------------------------------------------------------------------------


class Recording:
    """A graph: replayed, it computes what it did when it was captured from what lies in the same tensors now."""

    def __init__(self, call, op, stale=False):
        self.call, self.op, self.stale = call, op, stale
        self.results = {name: x.clone() for name, x in call.run(op).items()}
        call.reset()

    def replay(self):
        if self.stale:
            return
        for name, x in self.call.run(self.op).items():
            if name not in self.call.written:
                self.results[name].copy_(x)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("name", ["decode_attention", "selective_v_attention", "kv_cache_update"])
def test_replays(name, stale, monkeypatch):
    from gpu import checks
    from gpu.context import Context

    def capture(call, op):
        recording = Recording(call, op, stale)
        return recording, call.written or recording.results

    monkeypatch.setattr(checks, "_capture", capture)
    context = Context("cpu", lambda result: None)
    context.run(checks._GRAPHS[name], name)
    assert context.result["replays"] > 3
    assert context.result["status"] == ("failed" if stale else "passed"), context.failures


@pytest.mark.parametrize(
    "output, code, status",
    [
        ("all cases launched\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= Invalid __global__ read of size 16 bytes\nall cases launched", 99, "failed"),
        ("Segmentation fault", 139, "failed"),
        ("========= Error: Device not supported.", 1, "skipped"),
    ],
)
def test_what_the_sanitizer_says(output, code, status, tmp_path, monkeypatch):
    from gpu import sanitizer
    from gpu.context import Context

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    context = Context("cpu", lambda result: None)
    context.run(sanitizer.memcheck, "swiglu")
    assert context.result["status"] == status


# ---- speed -----------------------------------------------------------------------------------------------------------

PEAKS = {"read_gb_s": 10.0, "copy_gb_s": 10.0, "bf16_tflops": 0.1}


@pytest.mark.parametrize(
    "name", ["decode_attention", "flash_attention", "flash_attention_backward", "selective_v_attention"]
)
def test_a_wrong_result_gets_no_times(name, monkeypatch):
    from gpu.context import Context

    def halved(op, *args, **options):
        return tuple(x / 2 if x.is_floating_point() else x for x in op(*args, **options))

    break_op(name, halved, monkeypatch)
    context = Context("cpu", lambda result: None)
    context.run(getattr(import_module(f"gpu.speed.{name}"), name), PEAKS)
    assert context.result["status"] == "failed" and not context.result.get("rows")
    assert len(context.failures) == 2 and ": error " in context.failures[0]


def test_ops_that_are_wrong_are_not_timed(tmp_path):
    from argparse import Namespace

    from device_check import STEPS, Check

    args = Namespace(out=tmp_path, device="cpu", ops=tuple(OPS), steps=None, time_limit=570, commit=None)
    check = Check(args)
    for step, results in {
        "environment": {"all": {"status": "passed", "kernels": dict.fromkeys(OPS, True) | {"swiglu": False}}},
        "smoke": {"decode_attention": {"status": "timeout", "reason": "not finished within 60 s"}},
        "correctness": {"flash_attention": {"status": "failed", "reason": "1 failures"}},
    }.items():
        check.report.open(step, 1)
        for job, result in results.items():
            check.report.add(step, job, result)
    by_name = {step.name: step for step in STEPS}
    assert check._refusal(by_name["correctness"], "decode_attention")["reason"] == "decode_attention: smoke timeout"
    assert check._refusal(by_name["stability"], "flash_attention") is None  # more is to be learnt of it
    assert check._refusal(by_name["smoke"], "swiglu")["status"] == "missing"
    for op in SPEED:
        refusal = check._refusal(by_name[op], "all")
        assert refusal is None if op == "kv_cache_update" else refusal["status"] in ("skipped", "missing")
    assert check.report.ready == []


@pytest.mark.parametrize(
    "line, measured, verdicts",
    [
        ({"nbytes": 84e6, "tokens": 32768}, {"of limit": 0.9}, {"of limit": (0.88, True)}),
        ({"nbytes": 63e6, "tokens": 2048}, {"of limit": 0.1}, {}),
        ({"nbytes": 10.5e6, "tokens": 4096}, {"ours": 8.5e-6, "Sigma / own GQA-16": 0.7},
         {"ours": (8e-6, False), "Sigma / own GQA-16": (0.7, True)}),
        ({"nbytes": 42e6, "tokens": 16384}, {"Sigma / own GQA-16": 0.65, "cuDNN": 0.9},
         {"Sigma / own GQA-16": (0.64, False), "cuDNN": (1, False)}),
    ],
)  # fmt: skip
def test_targets(line, measured, verdicts):
    from gpu.speed.decode_attention import TARGETS

    from diffqkv.benchmarks.common.targets import bounds

    known = bounds(TARGETS, line | {"case": "decode_attention", "dtype": "bfloat16", "batch": 1})
    judged = {x: (known[x].value, known[x].reached_by(value)) for x, value in measured.items() if x in known}
    assert judged == verdicts


def test_the_grid_has_every_feature():
    from gpu.calls import TESTED_OPS

    dtypes = (torch.bfloat16, torch.float16)
    for on_gpu in (False, True):
        cases = TESTED_OPS["flash_attention_backward"].cases(dtypes, on_gpu)
        for name in ("causal", "window", "softcap", "scale", "sinks", "padded", "dropout", "memory", "dlse"):
            assert len({getattr(case, name) for case in cases}) > 1, name
        cases = TESTED_OPS["decode_attention"].cases(dtypes, on_gpu)
        for name in ("page", "memory", "gap", "padded", "scale", "window", "softcap", "sinks", "s_q"):
            assert len({getattr(case, name) for case in cases}) > 1, name
    heads = {case.heads for case in TESTED_OPS["flash_attention"].cases(dtypes, True)}
    assert {(32, 4, 16), (32, 16, 4), (12, 4, 6), (5, 1, 5)} <= heads
    assert reference.MAX_ADDED == 4  # as the selective cases count on
