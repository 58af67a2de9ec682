"""Which calls on CUDA tensors go to kernels. There is no GPU here: fake tensors stand in for those of one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from torch._subclasses import FakeTensorMode

import diffqkv
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled

ALL = (*dispatch.OPS, *dispatch.BACKWARD.values())
COMPILED = (*dispatch.OPS.values(), *(dispatch.OPS[name].backward for name in dispatch.BACKWARD))
BF16, F32 = torch.bfloat16, torch.float32
KERNEL, PLAIN = "kernel", "plain torch"

pytestmark = pytest.mark.usefixtures("library")


class Taken(Exception):
    """Raised by whatever a call arrives at."""


def arrives_at(what):
    def stop(*args, **options):
        raise Taken(what)

    return stop


@pytest.fixture
def kernels(monkeypatch):
    """A function that sets which CUDA kernels the library has, which of them have been tested, and the flag."""
    for op in dispatch.OPS.values():
        monkeypatch.setattr(op, "composed", arrives_at(PLAIN))
        monkeypatch.setattr(op, "kernel", arrives_at(KERNEL))

    def install(present=ALL, tested=ALL, untested=False):
        monkeypatch.setattr(compiled, "has_kernel", lambda op, device: op in present)
        monkeypatch.setattr(dispatch, "CUDA_TESTED", frozenset(tested))
        monkeypatch.setattr(dispatch, "CUDA_UNTESTED", untested)
        for op in COMPILED:
            monkeypatch.setattr(op, "on_cuda", dispatch.may_use_cuda(op.name))

    install()
    return install


def path_of(op, dtype=BF16, requires_grad=False, k_layout="rows"):
    """What a call of the public function on fake CUDA tensors arrives at."""

    def random(*shape):
        return torch.empty(*shape, device="cuda", dtype=dtype, requires_grad=requires_grad)

    def int32(*shape):
        return torch.empty(*shape, device="cuda", dtype=torch.int32)

    with FakeTensorMode(), pytest.raises(Taken) as taken:
        pair = (8, 32, 2) if dtype == BF16 else (16, 32)
        k_cache = random(1, 2, 64, 1, 16) if k_layout == "rows" else random(1, 2, 2, *pair)
        cached = (random(1, 4, 1, 16), k_cache, random(1, 2, 64, 2, 8), int32(1))
        if op == "flash_attention":
            diffqkv.flash_attention(random(1, 4, 3, 16), random(1, 2, 3, 16), random(1, 4, 3, 8))
        elif op == "flash_attention_varlen":
            lengths = (int32(2), int32(2), 3, 3)
            diffqkv.flash_attention_varlen(random(3, 4, 16), random(3, 2, 16), random(3, 4, 8), *lengths)
        elif op == "decode_attention":
            diffqkv.decode_attention(*cached, k_layout=k_layout)
        elif op == "selective_v_attention":
            diffqkv.selective_v_attention(*cached, 3, k_layout=k_layout)
        elif op == "kv_cache_update":
            new = (random(1, 2, 1, 16), random(1, 4, 1, 8), int32(1, 1))
            diffqkv.kv_cache_update(*cached[1:3], *new, k_layout=k_layout)
        elif op == "packed_linear":
            diffqkv.packed_linear(random(3, 64), random(1, 32, 32, 2) if dtype == BF16 else random(1, 64, 32), 32)
        elif op == "rms_norm":
            diffqkv.rms_norm(random(3, 8), random(8), 1e-6)
        elif op == "rotary_embedding":
            diffqkv.rotary_embedding(random(1, 2, 3, 8), random(1, 2, 8), random(1, 2, 8))
        else:
            diffqkv.swiglu(random(3, 8), random(3, 8))
    return str(taken.value)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_each_kernel_is_used_once_it_is_tested(kernels, op):
    kernels(tested=())
    assert path_of(op) == PLAIN
    kernels(tested={op})
    assert {other: path_of(other) for other in dispatch.OPS} == dict.fromkeys(dispatch.OPS, PLAIN) | {op: KERNEL}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_untested_kernels_are_opt_in(kernels, op):
    kernels(tested=(), untested=True)
    assert path_of(op) == KERNEL
    kernels(present=set(ALL) - {op}, tested=(), untested=True)
    assert path_of(op) == PLAIN


def test_a_name_in_the_table_is_not_yet_a_kernel(kernels):
    kernels(present=())
    assert path_of("swiglu") == PLAIN
    assert diffqkv.config()["ops"]["swiglu"]["cuda"] == "plain torch (no CUDA kernel in the library)"


@pytest.mark.parametrize("op", dispatch.BACKWARD)
def test_gradients_need_the_kernel_of_the_backward_pass(kernels, op):
    assert path_of(op, requires_grad=True) == KERNEL
    for without in ({"tested": {op}}, {"present": {op}, "untested": True}):
        kernels(**without)
        assert path_of(op) == KERNEL
        assert path_of(op, requires_grad=True) == PLAIN
        with torch.no_grad():
            assert path_of(op, requires_grad=True) == KERNEL


def test_panels_are_for_plain_torch(kernels):
    assert path_of("decode_attention", k_layout="panels") == PLAIN
    assert path_of("selective_v_attention", k_layout="panels") == PLAIN
    assert path_of("kv_cache_update", k_layout="panels") == KERNEL


@pytest.mark.parametrize("op", dispatch.OPS)
def test_dtypes(kernels, op):
    """All that an op takes; a dtype that it refuses is refused by plain torch."""
    assert path_of(op, dtype=F32) == KERNEL
    assert path_of(op, dtype=torch.float64) == (KERNEL if op.startswith("flash_attention") else PLAIN)


def test_autocast_decides_on_the_dtype(kernels, monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    monkeypatch.setattr(dispatch.OPS["flash_attention"], "dtypes", (BF16,))
    before = torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        x = torch.empty(1, 4, 3, 16, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", BF16)
        try:
            assert dispatch.uses_kernel(dispatch.OPS["flash_attention"], x)
            assert not dispatch.uses_kernel(dispatch.OPS["decode_attention"], x.double())  # autocast leaves it alone
        finally:
            torch.set_autocast_dtype("cuda", before)
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus(kernels, monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    dispatch._is_new_enough.cache_clear()
    try:
        assert dispatch.cuda_path(dispatch.OPS["swiglu"])[0] == runs
        x = type("OnGpu", (), {"device": torch.device("cuda", 0), "dtype": BF16})()
        assert dispatch.uses_kernel(dispatch.OPS["kv_cache_update"], x) == runs
    finally:
        dispatch._is_new_enough.cache_clear()


def test_the_question_can_be_traced(kernels):
    def branch(x):
        return x + 1 if dispatch.uses_kernel(dispatch.OPS["swiglu"], x, k_layout=0) else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(branch, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        for present, nodes in ((ALL, "add"), ((), "sub")):
            kernels(present=present)
            torch._dynamo.reset()
            graph, _ = torch._dynamo.export(branch)(x)
            assert nodes in {getattr(node.target, "__name__", "") for node in graph.graph.nodes}


def test_config_says_which_path_and_why(kernels):
    def paths():
        return {op: entry["cuda"] for op, entry in diffqkv.config()["ops"].items()}

    kernels(tested=())
    why = "plain torch (the CUDA kernel has never run on a GPU; DIFFQKV_CUDA_UNTESTED=1 uses it)"
    assert paths() == dict.fromkeys(dispatch.OPS, why)
    kernels(tested=(), untested=True)
    assert paths()["kv_cache_update"] == "compiled kernel (never run on a GPU)"
    kernels(tested={"swiglu"})
    assert paths()["swiglu"] == "compiled kernel (gradients in plain torch)"
    kernels()
    assert paths()["swiglu"] == "compiled kernel"


@pytest.mark.parametrize("runs", [False, True])
def test_compiled_packed_rows_of_a_model_need_a_kernel(runs, monkeypatch):
    attention = pytest.importorskip("diffqkv.models.attention")
    asked = []

    def uses_kernel(op, *tensors):
        asked.append((op.name, len(tensors)))
        return runs

    monkeypatch.setattr(attention, "uses_kernel", uses_kernel)
    monkeypatch.setattr(attention, "stock_attention", lambda *args, **options: (PLAIN, None))
    monkeypatch.setattr(attention, "flash_attention_varlen", lambda q, *args, **options: q)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module = type("Layer", (), {"is_causal": True, "config": type("Config", (), {})()})()
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 4, 3, 16)
    packing = {"cu_seq_lens_q": torch.tensor([0, 2, 3]), "max_length_q": 2}
    out, _ = attention.diffqkv_attention(module, q, k, v, None, **packing)
    assert asked == [("flash_attention_varlen", 3)]
    assert torch.equal(out, q.transpose(1, 2)) if runs else out == PLAIN


def test_another_library(tmp_path):
    """DIFFQKV_LIBRARY names one that was built elsewhere."""
    library = tmp_path / "elsewhere.so"
    library.symlink_to(compiled.path)
    code = """
import sys
sys.modules["transformers"] = None
import diffqkv
print(diffqkv.config()["library"], diffqkv.config()["reason"])
"""
    for path, expected in ((library, f"{library} None"), (tmp_path / "none.so", "None DIFFQKV_LIBRARY: got .*none.so")):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "DIFFQKV_LIBRARY": str(path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert re.match(expected, run.stdout), run.stdout + run.stderr
