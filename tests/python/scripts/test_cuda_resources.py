"""scripts/cuda_resources.py: what it reads off the compiler's report, and what it makes of it."""

import importlib.util
import json
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "scripts" / "cuda_resources.py"
MANGLED = "_ZN7diffqkv6device10run_kernelINS0_6SwigluINS0_3F32ELb0EEEEEvNT_6ParamsE"
REPORT = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90a'
ptxas info    : Function properties for {MANGLED}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 138 registers, used 1 barriers, 288 bytes smem
ptxas info    : Compile time = 8.461 ms
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_80'
ptxas info    : Function properties for {MANGLED}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
PTX = f".visible .entry {MANGLED}(\n\t.param .align 8 .b8 p[80]\n)\n.maxntid 128, 1, 1\n.minnctapersm 4\n{{"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_compilers_report(script):
    hopper, ampere = script.demangled(script.parse("swiglu/swiglu.cu", REPORT, [PTX]))
    assert hopper == ("swiglu/swiglu.cu", "Swiglu<F32, false>", "sm_90a", 128, 138, 288, 0, 0)
    assert ampere[2:] == ("sm_80", 128, 40, 0, 16, 12)
    text = script.table([hopper, ampere], "nvcc 13.0.")
    assert "| swiglu/swiglu.cu | `Swiglu<F32, false>` | 128 | 288 |" in text


@pytest.mark.parametrize(
    "arch, threads, registers, blocks, shared",
    [
        ("sm_90a", 128, 32, 16, 228 * 1024 // 16 - 1024),  # threads
        ("sm_90a", 32, 8, 32, 228 * 1024 // 32 - 1024),  # blocks
        ("sm_90a", 128, 168, 3, 228 * 1024 // 3 - 1024),  # registers: 4 warps of 168 * 32
        ("sm_90a", 128, 161, 3, 228 * 1024 // 3 - 1024),  # handed out by the 256
        ("sm_90a", 384, 168, 1, 228 * 1024 - 1024),
        ("sm_80", 128, 128, 4, 164 * 1024 // 4 - 1024),
        ("sm_89", 256, 40, 6, 100 * 1024 // 6 - 1024),
        ("sm_120", 128, 32, None, None),  # not in the list
    ],
)
def test_occupancy(script, arch, threads, registers, blocks, shared):
    kernel = script.Kernel("x.cu", "x", arch, threads, registers, 0, 0, 0)
    assert kernel.blocks() == blocks and kernel.shared_left() == shared


def test_a_build_without_kernels_is_refused(tmp_path):
    (tmp_path / "compile_commands.json").write_text(json.dumps([{"file": "x.cpp", "command": "g++", "directory": "."}]))
    command = [sys.executable, SCRIPT, tmp_path, "--out", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "without CUDA sources" in run.stderr


def test_limits(script):
    plan = {"blocks": 66, "bytes": 4.8e9, "flops": 989e12, "bytes_under_way": 48_000}
    least = script.limits(plan, "h200", 132, 4800, 2)
    assert least["memory"] == pytest.approx(1e3)  # a millisecond at 4.8 TB/s
    assert least["latency"] == pytest.approx(4.8e9 / (66 * 48_000))  # 66 blocks at a time, a microsecond each
    assert least["arithmetic"] == pytest.approx(4e6)  # a quarter of the 264 places is taken
    plan["blocks"] = 265  # two waves
    assert script.limits(plan, "h200", 132, 4800, 2)["arithmetic"] == pytest.approx(2e6 * 264 / 265)


def test_every_planned_call_names_a_kernel(script, library):
    from diffqkv import _core

    for name in ("h200", "a100"):
        for *shape, s_q, s_k, batch in script._CALLS:
            plan = _core.plan_cuda_attention(_core.GPUS[name], *shape, s_q, s_k, batch, "bfloat16")
            assert plan["instance"].startswith("DecodeAttention<BF16" if s_q <= 16 else "FlashAttention<BF16")
            assert plan["bytes_under_way"] > 0
