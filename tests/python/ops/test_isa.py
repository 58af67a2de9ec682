"""Every instruction set level that this CPU runs, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from paths import PACKAGE, SUPPORT

LEVELS = ["v2", "v3", "v4", "v4_bf16"]

CHECK = """
import sys
import torch
from helpers import (
    DTYPES, LAYOUTS, TAILS, TRAINING_DTYPES, WEIGHTS, assert_accurate, assert_linear, assert_lse, cache_of, int32,
    linear_weights, qkv,
)
from diffqkv import _core, reference

assert _core.cpu_isa() == sys.argv[1], _core.cpu_isa()
torch.manual_seed(0)
ops, D = torch.ops.diffqkv, torch.float64

for dtype in DTYPES:
    for heads, dims in (((32, 4, 16), (64, 64)), ((12, 6, 4), (40, 56)), ((5, 1, 5), (8, 256))):
        for s_q, s_k in ((1, 33), (31, 70), (97, 97)):
            q, k, v = qkv(2, heads, s_q, s_k, dims, dtype)
            options = {"causal": True, "kv_start": int32(0, 3)}
            out, lse = ops.flash_attention(q, k, v, **options)
            exact, exact_lse = reference.attention(q, k, v, return_lse=True, dtype=D, **options)
            assert_accurate(out, exact, reference.attention(q, k, v, dtype=dtype, **options))
            assert_lse(lse, exact_lse)
        for layout, block_size in (("rows", None), ("panels", None), ("panels", 32)):
            q, k, v = qkv(2, heads, 2, 600, dims, dtype)
            cache = cache_of(k, v, int32(600, 77), layout=layout, block_size=block_size, start=int32(5, 0))
            args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
            out, lse = ops.decode_attention(*args, **cache.options)
            exact, exact_lse = reference.decode_attention(
                *args, return_lse=True, dtype=D, **cache.reference_options
            )
            assert_accurate(out, exact, reference.decode_attention(*args, dtype=dtype, **cache.reference_options))
            assert_lse(lse, exact_lse)

            q, k = q.round(), k.round()
            cache = cache_of(k, v, int32(600, 77), layout=layout, block_size=block_size)
            args = (q, cache.k_cache, cache.v_cache, cache.seqlens, 40)
            for code, tail in enumerate(TAILS):
                out, _, _, indices, rows_used, _ = ops.selective_v_attention(
                    *args, tail=code, return_indices=True, **cache.options
                )
                exact, want = reference.selective_v_attention(*args, tail=tail, dtype=D, **cache.reference_options)
                low, _ = reference.selective_v_attention(
                    *args, tail=tail, dtype=torch.float32, **cache.reference_options
                )
                assert torch.equal(indices, want.indices) and torch.equal(rows_used, want.rows_used)
                assert_accurate(out, exact, low.to(dtype))

            k, v = k[:, :, :61].contiguous(), v[:, :, :61].contiguous()
            cos, sin = torch.randn(2, 1, 61, dims[0] - 2).unbind()
            positions = torch.cat([torch.arange(35, 95), torch.tensor([-1])])
            positions = torch.stack([positions, positions.roll(20)])
            cache = cache_of(k.new_zeros(2, heads[1], 96, dims[0]), v.new_zeros(2, heads[2], 96, dims[1]),
                             int32(96, 96), layout=layout, block_size=block_size)
            want_k, want_v = cache.k_cache.clone(), cache.v_cache.clone()
            table = {"block_table": cache.block_table, "cos": cos, "sin": sin}
            ops.kv_cache_update(cache.k_cache, cache.v_cache, k, v, positions,
                                k_layout=cache.options["k_layout"], **table)
            reference.cache_update(want_k, want_v, k, v, positions, k_layout=layout, **table)
            assert_accurate(cache.k_cache, want_k.double(), want_k)
            torch.testing.assert_close(cache.v_cache, want_v, rtol=0, atol=0, equal_nan=True)

    gate, up, dout = torch.randn(3, 7, 333).to(dtype)
    assert_accurate(ops.swiglu(gate, up), reference.swiglu(gate, up, D), reference.swiglu(gate, up, dtype))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.autograd.grad(reference.swiglu(g, u), (g, u), dout.double())
    for actual, e in zip(ops.swiglu_backward(dout, gate, up), exact, strict=True):
        assert_accurate(actual, e, e.to(dtype), factor=3)
    halves = torch.stack([gate, up], 1).flatten(1).chunk(2, -1)
    assert torch.equal(ops.swiglu(*halves), ops.swiglu(gate, up))

    for weight in (torch.randn(333), torch.randn(333).to(dtype)):
        exact = reference.rms_norm(gate, weight, 1e-5, D)
        least = max(1e-6, 4 * torch.finfo(dtype).tiny)
        error = (ops.rms_norm(gate, weight, 1e-5).double() - exact).abs() / exact.abs().clamp(min=least)
        assert error.max() <= 2 * torch.finfo(dtype).eps + 1e-6, error.max()
    for d, d_rot in ((64, 64), (40, 24), (128, 90)):
        x = torch.randn(2, 9, 3, d).to(dtype)
        cos, sin = torch.randn(2, 1, 9, d_rot).to(dtype).unbind()
        out = ops.rotary_embedding(x, cos, sin)
        assert_accurate(out, reference.rotary_embedding(x, cos, sin, D), reference.rotary_embedding(x, cos, sin, dtype))
        k_cache, v_cache = x.new_zeros(2, 3, 9, 1, d), x.new_zeros(2, 3, 9, 1, 8)
        ops.kv_cache_update(k_cache, v_cache, x.transpose(1, 2), v_cache[..., 0, :].clone(),
                            torch.arange(9).expand(2, 9), cos=cos, sin=sin)
        assert torch.equal(out, k_cache[..., 0, :].transpose(1, 2))

    for form, zeros in WEIGHTS:
        for rows, n, group_size in ((1, 45, 32), (4, 70, 96), (7, 32, 32), (30, 100, 256)):
            w = linear_weights(form, n, 3 * group_size, dtype, zeros, group_size)
            x, bias = torch.randn(rows, 3 * group_size).to(dtype), torch.randn(n).to(dtype)
            out = ops.packed_linear(x, *w, bias, n)
            assert_linear(out, x, n, w, bias, kernel=True)
            assert torch.equal(out[-1:], ops.packed_linear(x[-1:], *w, bias, n))

TRAINING = [
    {"causal": True},
    {"window": (40, 9), "softcap": 2.0},
    {"causal": True, "window": (30, -1), "dropout_p": 0.3, "seed": -5, "offset": 2},
]

def train(function, tensors, sinks, dout, dlse, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (*tensors, sinks)]
    out, lse = function(*leaves[:3], sinks=leaves[3], **options)
    outputs = (dout.to(out.dtype), dlse.to(lse.dtype))
    return out.detach(), lse.detach(), torch.autograd.grad((out, lse), leaves, outputs)

for dtype in TRAINING_DTYPES:
    for heads, dims in (((12, 6, 4), (40, 56)), ((8, 2, 4), (64, 64))):
        for s_q, s_k in ((1, 33), (70, 101), (130, 300)):
            for options in TRAINING:
                q, k, v = qkv(2, heads, s_q, s_k, dims, dtype)
                given = {"window": (-1, -1), "kv_start": int32(0, 3), "kv_end": int32(s_k, s_k - 5)} | options
                rest = dict(given)
                left, right = rest.pop("window")
                sinks, dlse = torch.randn(heads[0]), torch.randn(2, heads[0], s_q)
                dout = torch.randn(2, heads[0], s_q, dims[1]).to(dtype)
                inputs = ((q, k, v), sinks, dout, dlse)
                out, lse, gradients = train(ops.flash_attention, *inputs, window_left=left, window_right=right, **rest)
                (exact, exact_lse, wanted), (low, _, low_gradients) = (
                    train(lambda *a, **o: reference.attention(*a, return_lse=True, dtype=to, **o), *inputs, dtype=to,
                          **given)
                    for to in (D, dtype)
                )
                assert_accurate(out, exact, low)
                assert_lse(lse, exact_lse, torch.promote_types(dtype, torch.float32))
                for actual, e, lo in zip(gradients, wanted, low_gradients, strict=True):
                    assert_accurate(actual if dtype == D else actual.to(dtype), e, lo, factor=3)
print("all right")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_level(library, level):
    from diffqkv import _core

    known = _core.cpu_isa_levels()
    assert set(known) <= set(LEVELS), f"a level that this test does not know: {known}"
    if level not in known:
        pytest.skip(f"this CPU does not run {level}, only {', '.join(known)}")
    environment = os.environ | {
        "DIFFQKV_CPU_ISA": level,
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, "-c", CHECK, level], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "all right" in run.stdout, run.stdout + run.stderr


def test_unknown_level_is_refused(library):
    environment = os.environ | {
        "DIFFQKV_CPU_ISA": "v9",
        "PYTHONPATH": str(PACKAGE),
    }
    code = "import torch, diffqkv; diffqkv.swiglu(torch.ones(8), torch.ones(8))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "DIFFQKV_CPU_ISA" in run.stderr and "v9" in run.stderr, run.stderr
