"""benchmarks/device_check.py where there is no GPU: that it passes, fails and reports as it says."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from paths import PACKAGE, ROOT

from diffqkv import reference
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled

BENCHMARKS = ROOT / "benchmarks"
OPS = {*dispatch.OPS, *dispatch.BACKWARD.values()}
DECIDING = ("smoke", "correctness", "stability", "large")
SECTIONS = ("decode", "prefill", "backward", "selective", "cache_update", "swiglu")

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def device_check(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "device_check.py"), "--library", str(compiled.path), "--out", str(out)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=250)


def test_dry_run(tmp_path):
    """opcheck, of which all ops have their own tests, is left out: it takes as long as all the rest."""
    run = device_check(tmp_path, "--device", "cpu", "--stages", *DECIDING, *SECTIONS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("planned: ")
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert report["passed"] and report["dry_run"] and set(report["ready"]) == OPS
    assert report["environment"]["library"] == str(compiled.path)
    stages = report["stages"]
    assert set(stages) == {"environment", *DECIDING, *SECTIONS}
    assert {job["status"] for stage in stages.values() for job in stage["jobs"].values()} == {"passed"}
    assert all(set(stages[stage]["jobs"]) == OPS for stage in DECIDING)
    assert sum(job["cases"] for job in stages["correctness"]["jobs"].values()) > 200
    assert all(job["repetitions"] and job["entries_alone"] for job in stages["stability"]["jobs"].values())
    for section in SECTIONS:
        rows = stages[section]["jobs"]["all"]["rows"]
        assert len(rows) >= 2 and all(row["µs"] > 0 for row in rows)
    assert all(row["own GQA-16 µs"] for row in stages["decode"]["jobs"]["all"]["rows"])
    text = (tmp_path / "device_check.md").read_text()
    assert "Device check: passed" in text and "says nothing about a GPU" in text and "## prefill" in text
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
    assert not report["passed"] and report["stages"]["environment"]["jobs"]["all"]["status"] == "skipped"


def test_the_plan_fits_into_ten_minutes():
    from device_check import OPS as KNOWN
    from device_check import STAGES

    assert set(KNOWN) == OPS
    assert sum(stage.planned for stage in STAGES) < 570
    assert [stage.name for stage in STAGES][:3] == ["environment", "smoke", "correctness"]
    assert all(stage.limit >= stage.planned for stage in STAGES)


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
    from device_stages.jobs import Job, run

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
    from device_stages import context
    from device_stages.context import Context

    real = Context.op

    def op(self, asked):
        return partial(broken, real(self, asked)) if asked == name else real(self, asked)

    monkeypatch.setattr(Context, "op", op)
    monkeypatch.setattr(context, "_TOO_MANY", 2)  # enough


def run_stage(stage, name, monkeypatch, broken=None):
    """The context after a stage whose op, if it is broken, does other things: broken(op, **arguments)."""
    from device_stages import checks
    from device_stages.context import Context

    if broken is not None:
        break_op(name, broken, monkeypatch)
    context = Context("cpu", lambda result: None)
    context.run(getattr(checks, stage), name)
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
    context = run_stage("correctness", name, monkeypatch, broken)
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
    context = run_stage("stability", name, monkeypatch, Wavering() if kind == "wavering" else depends_on_the_batch)
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

    context = run_stage("large", name, monkeypatch, short)
    assert context.result["status"] == "failed"


def test_a_kernel_that_raises_is_found(monkeypatch):
    def raising(op, **args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    context = run_stage("correctness", "decode_attention", monkeypatch, raising)
    assert context.result["status"] == "failed" and "illegal memory access" in context.failures[0]


def test_opcheck_finds_a_wrong_fake_kernel(monkeypatch):
    assert run_stage("contract", "swiglu", monkeypatch).result == {"opchecks": 4, "status": "passed"}
    monkeypatch.setattr(torch.library, "opcheck", lambda *args: (_ for _ in ()).throw(AssertionError("other strides")))
    context = run_stage("contract", "swiglu", monkeypatch)
    assert context.result["status"] == "failed" and "other strides" in context.failures[0]


# ---- what only a GPU runs --------------------------------------------------------------------------------------------


class Recording:
    """A graph: replayed, it computes what it did when it was captured from what lies in the same tensors now."""

    def __init__(self, problem, op, stale=False):
        self.problem, self.op, self.stale = problem, op, stale
        self.results = {name: x.clone() for name, x in problem.run(op).items()}
        problem.reset()

    def replay(self):
        if self.stale:
            return
        for name, x in self.problem.run(self.op).items():
            if name not in self.problem.written:
                self.results[name].copy_(x)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("name", ["decode_attention", "selective_v_attention", "kv_cache_update"])
def test_replays(name, stale, monkeypatch):
    from device_stages import checks
    from device_stages.context import Context

    def capture(problem, op):
        recording = Recording(problem, op, stale)
        return recording, problem.written or recording.results

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
    from device_stages import sanitizer
    from device_stages.context import Context

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
    "section, name",
    [
        ("decode", "decode_attention"),
        ("prefill", "flash_attention"),
        ("backward", "flash_attention_backward"),
        ("selective", "selective_v_attention"),
    ],
)
def test_a_wrong_result_gets_no_times(section, name, monkeypatch):
    from device_stages.context import Context
    from device_stages.figures import sections

    def halved(op, *args, **options):
        return tuple(x / 2 if x.is_floating_point() else x for x in op(*args, **options))

    break_op(name, halved, monkeypatch)
    context = Context("cpu", lambda result: None)
    context.run(getattr(sections, section), PEAKS)
    assert context.result["status"] == "failed" and not context.result.get("rows")
    assert len(context.failures) == 2 and "of the largest element" in context.failures[0]


def test_ops_that_are_wrong_are_not_timed(tmp_path):
    from argparse import Namespace

    from device_check import STAGES, Check

    args = Namespace(out=tmp_path, device="cpu", ops=tuple(OPS), stages=None, time_limit=570, commit=None)
    check = Check(args)
    for stage, results in {
        "environment": {"all": {"status": "passed", "kernels": dict.fromkeys(OPS, True) | {"swiglu": False}}},
        "smoke": {"decode_attention": {"status": "timeout", "reason": "not finished within 60 s"}},
        "correctness": {"flash_attention": {"status": "failed", "reason": "1 failures"}},
    }.items():
        check.report.open(stage, 1)
        for job, result in results.items():
            check.report.add(stage, job, result)
    by_name = {stage.name: stage for stage in STAGES}
    assert check._refusal(by_name["correctness"], "decode_attention")["reason"] == "decode_attention: smoke timeout"
    assert check._refusal(by_name["stability"], "flash_attention") is None  # more is to be learnt of it
    assert check._refusal(by_name["smoke"], "swiglu")["status"] == "missing"
    for section in ("decode", "prefill", "backward", "selective", "swiglu"):
        assert check._refusal(by_name[section], "all")["status"] in ("skipped", "missing")
    assert check._refusal(by_name["cache_update"], "all") is None
    assert check.report.ready == []


@pytest.mark.parametrize(
    "line, verdicts",
    [
        ({"MB": 84.0, "batch": 1, "tokens": 32768, "of read": 0.9}, {"of read ≥ 0.88": True}),
        ({"MB": 63.0, "batch": 1, "tokens": 2048, "of read": 0.1}, {}),
        ({"MB": 10.5, "batch": 1, "tokens": 4096, "µs": 8.5, "less than own GQA-16": 0.3},
         {"µs ≤ 8 µs": False, "less than own GQA-16 ≥ 0.3": True}),
        ({"MB": 42.0, "batch": 1, "tokens": 16384, "less than own GQA-16": 0.35, "ours / cuDNN": 1.1},
         {"less than own GQA-16 ≥ 0.36": False, "ours / cuDNN < 1": False}),
    ],
)  # fmt: skip
def test_targets(line, verdicts):
    from device_stages.figures.targets import judged

    assert {x["target"]: x["met"] for x in judged("decode", line)} == verdicts


def test_the_grid_has_every_feature():
    from device_stages.problems import SUBJECTS

    dtypes = (torch.bfloat16, torch.float16)
    for on_gpu in (False, True):
        cases = SUBJECTS["flash_attention_backward"].cases(dtypes, on_gpu)
        for name in ("causal", "window", "softcap", "scale", "sinks", "padded", "dropout", "memory", "dlse"):
            assert len({getattr(case, name) for case in cases}) > 1, name
        cases = SUBJECTS["decode_attention"].cases(dtypes, on_gpu)
        for name in ("page", "memory", "gap", "padded", "scale", "window", "softcap", "sinks", "s_q"):
            assert len({getattr(case, name) for case in cases}) > 1, name
    heads = {case.heads for case in SUBJECTS["flash_attention"].cases(dtypes, True)}
    assert {(32, 4, 16), (32, 16, 4), (12, 4, 6), (5, 1, 5)} <= heads
    assert reference.MAX_ADDED == 4  # as the selective cases count on
