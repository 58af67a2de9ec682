"""The ops of a layer beside attention, against `reference.py`, on both paths: swiglu, packed_linear, rms_norm, RoPE."""

import pytest
import torch
from helpers import DTYPES, NAN, WEIGHTS, assert_accurate, assert_linear, linear_weights

from diffqkv import quantization, reference

D = torch.float64


# ---- swiglu ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 33), (2, 3, 1024), (0, 4)])
def test_swiglu(ops, shape, dtype):
    gate, up, dout = ((3 * torch.randn(shape)).to(dtype) for _ in range(3))
    out = ops.swiglu(gate, up)
    assert out.dtype == dtype and out.shape == shape
    assert_accurate(out, reference.swiglu(gate, up, D), reference.swiglu(gate, up, dtype))
    exact, low = (
        torch.autograd.grad(reference.swiglu(g, u, to), (g, u), dout.to(to))
        for to in (D, dtype)
        for g, u in [(gate.to(to).requires_grad_(), up.to(to).requires_grad_())]
    )
    for actual, e, lo in zip(ops.swiglu_backward(dout, gate, up), exact, low, strict=True):
        assert_accurate(actual, e, lo, factor=3)


def test_swiglu_extremes(ops):
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, torch.inf, 88.0, -88.0, -104.0, NAN])
    out = ops.swiglu(gate, torch.ones(9))
    assert_accurate(out, reference.swiglu(gate.double(), torch.ones(9, dtype=D)), reference.swiglu(gate, torch.ones(9)))


def test_swiglu_of_huge_gates(ops):
    """What torch gives, forward and backward: 0 where the sigmoid is, however large its factor, NaN of -inf and NaN."""
    sizes = torch.logspace(1, 38.5, 301)
    gate = torch.cat([-sizes, sizes, torch.linspace(-104, -80, 301), torch.tensor([torch.inf, -torch.inf, NAN])])
    for up in (torch.ones(gate.shape), torch.full(gate.shape, -1e3)):
        dout = torch.full(gate.shape, 2.0)
        leaves = [x.double().requires_grad_() for x in (gate, up)]
        exact = torch.nn.functional.silu(leaves[0]) * leaves[1]
        exact = (exact, *torch.autograd.grad(exact, leaves, dout.double()))
        for actual, want in zip((ops.swiglu(gate, up), *ops.swiglu_backward(dout, gate, up)), exact, strict=True):
            torch.testing.assert_close(actual, want.detach().float(), rtol=1e-5, atol=1e-33, equal_nan=True)


def test_swiglu_strides(ops):
    gate, up = torch.randn(2, 6, 10, 16).transpose(1, 2).unbind(0)
    torch.testing.assert_close(ops.swiglu(gate, up), reference.swiglu(gate, up))
    expanded = torch.ones(()).expand(gate.shape)
    for actual, want in zip(
        ops.swiglu_backward(expanded, gate, up), ops.swiglu_backward(torch.ones(gate.shape), gate, up), strict=True
    ):
        assert torch.equal(actual, want)


def test_swiglu_of_rows_that_lie_apart(ops):
    """Halves of a wider tensor, each with strides of its own, have the bits of rows side by side."""
    for dtype in DTYPES:
        both = torch.randn(3, 5, 2 * 37).to(dtype)
        gate, up = both.chunk(2, dim=-1)
        for g, u in ((gate, up), (gate, up.contiguous()), (gate[:, 1:3], up[:, 1:3]), (gate[:1], up[:1]),
                     (gate.mT, up.mT), (gate, up[:, :1].expand(gate.shape)), (gate[0, 0], up[0, 0])):  # fmt: skip
            out = ops.swiglu(g, u)
            assert out.is_contiguous()
            tolerance = {"rtol": 0, "atol": 0} if ops.name == "library" else {}  # torch's loops differ by strides
            torch.testing.assert_close(out, ops.swiglu(g.contiguous(), u.contiguous()), **tolerance)


# ---- packed_linear ---------------------------------------------------------------------------------------------------


def check_linear(ops, x, n, w, bias=None):
    out = ops.packed_linear(x, *w, bias, n)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], n) and out.is_contiguous()
    assert_linear(out, x, n, w, bias, kernel=ops.name == "library")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, zeros", WEIGHTS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 256), (2, 3, 288), (2, 1, 3, 96), (40, 512)])
def test_packed_linear(ops, shape, form, zeros, dtype):
    for n in (1, 32, 45, 70):
        w = linear_weights(form, n, shape[-1], dtype, zeros)
        check_linear(ops, torch.randn(shape).to(dtype), n, w, torch.randn(n).to(dtype) if n > 1 else None)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("group_size", quantization.GROUP_SIZES)
def test_packed_linear_groups(ops, group_size, form):
    k = 2 * group_size
    for dtype in DTYPES:
        check_linear(ops, torch.randn(5, k).to(dtype), 40, linear_weights(form, 40, k, dtype, True, group_size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_of_any_number_of_input_features(ops, dtype):
    for k in (1, 2, 3, 62, 129, 257, 1030):
        if dtype != torch.bfloat16 or k % 2 == 0:
            check_linear(ops, torch.randn(3, k).to(dtype), 33, linear_weights("own", 33, k, dtype))


@pytest.mark.parametrize("form", ["own", "int8", "int4"])
def test_packed_linear_strides(ops, form):
    """Rows that lie apart or are one in memory, columns that lie apart, and memory that begins at an odd number."""
    n, k = 40, 64
    for dtype in DTYPES:
        w = linear_weights(form, n, k, dtype)
        x = torch.randn(6, k).to(dtype)

        def check(x, want, w=w):
            out = ops.packed_linear(x, *w, None, n)
            if ops.name == "library":
                assert torch.equal(out, want)
            else:  # torch chooses the order of its sums by the strides
                torch.testing.assert_close(out, want)

        want = ops.packed_linear(x, *w, None, n)
        apart = torch.full((6, 3 * k + 1), NAN, dtype=dtype)
        for columns in (slice(1, k + 1), slice(0, 2 * k, 2)):
            apart[:, columns] = x
            check(apart[:, columns], want)
        check(x.T.contiguous().T, want)
        check(x.view(2, 3, k).transpose(0, 1), want.view(2, 3, n).transpose(0, 1))
        check(x[:1].expand(4, k), want[:1].expand(4, n))
        buffer = torch.empty(k + 1, dtype=dtype)
        buffer[1:] = x[0]
        check(buffer[1:], want[0])


@pytest.mark.parametrize("form", ["own", "int8", "int4"])
def test_packed_linear_without_rows(ops, form):
    w = linear_weights(form, 40, 64)
    for shape in ((0, 64), (2, 0, 64), (0, 3, 64)):
        out = ops.packed_linear(torch.empty(shape), *w, torch.randn(40), 40)
        assert out.shape == (*shape[:-1], 40) and out.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["own", "int8", "int4"])
def test_packed_linear_of_what_is_not_finite(ops, form, dtype):
    w = linear_weights(form, 40, 256, dtype)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 256).to(dtype)
        clean = ops.packed_linear(x, *w, None, 40)
        for bad in (NAN, torch.inf, -torch.inf):
            changed = x.clone()
            changed[rows // 2, 77] = bad
            out = ops.packed_linear(changed, *w, None, 40)
            others = torch.arange(rows) != rows // 2
            assert torch.equal(out[others], clean[others])
            row = out[rows // 2]
            assert not row.isfinite().any()
            if bad != bad or (ops.name == "library" and form != "own"):
                assert row.isnan().all()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_packed_linear_of_small_and_large_groups(library, form):
    """Zeros, numbers that are no normal ones, and large ones, each beside groups of others."""
    x = torch.randn(3, 128)
    x[0, :32], x[0, 32:64] = 0, 1e-41 * torch.randn(32)
    x[1, 96:] *= 1e30
    x[2] *= 3e-39
    check_linear(library, x, 40, linear_weights(form, 40, 128, zeros=True))
    assert (library.packed_linear(torch.zeros(3, 128), *linear_weights(form, 40, 128), None, 40) == 0).all()


# ---- rms_norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33), (2, 3, 1024), (1, 1, 4100), (0, 4), (4, 0)])
def test_rms_norm(ops, shape, dtype, wide_weight):
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(torch.float32 if wide_weight else dtype)
    out = ops.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    exact = reference.rms_norm(x, weight, 1e-5, D)
    # Two roundings to the dtype, as Llama's, and those of float32.
    error = (out.double() - exact).abs() / exact.abs().clamp(min=max(1e-6, 4 * torch.finfo(dtype).tiny))
    assert error.numel() == 0 or error.max() <= 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_infinities_and_nan(ops, dtype):
    x, largest = torch.randn(8, 20), torch.finfo(dtype).max
    x[0, 3], x[1, 5], x[2, 0], x[3], x[4] = torch.inf, NAN, -torch.inf, 0, largest
    x[5, 7] = largest
    x, weight = x.to(dtype), torch.ones(20, dtype=dtype)
    wide = x.float()
    want = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), want, **tolerance)
    assert ops.rms_norm(x[3:4], weight, 0.0).isnan().all()  # 0 / 0


def test_rms_norm_strides(ops):
    weight, base = torch.randn(16), torch.randn(4, 6, 40)
    for x in (base[..., :16], base[:, ::2, 3:19], base[1:2, :, 3:19], base.transpose(0, 1)[..., :16],
              base[..., ::2][..., :16], base[:, :1, :16].expand(4, 6, 16), base[0, 0, 5:21]):  # fmt: skip
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x.contiguous(), weight, 1e-5), rtol=0,
                                   atol=0)  # fmt: skip


# ---- rotary_embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_rot"), [(64, 64), (64, 48), (40, 40), (7, 6), (3, 0), (256, 256)])
def test_rotary_embedding(ops, d, d_rot, dtype, wide):
    for b, t, heads, b_rope in ((2, 5, 3, 2), (3, 1, 4, 1), (1, 70, 5, 1), (0, 4, 2, 1), (2, 0, 2, 2)):
        base = torch.randn(b, heads, t, d + 3).to(dtype)
        cos, sin = (torch.randn(b_rope, t, d_rot).to(torch.float32 if wide else dtype) for _ in range(2))
        for x in (base[..., :d].transpose(1, 2), base[..., 1 : d + 1].transpose(1, 2).contiguous()):
            out = ops.rotary_embedding(x, cos, sin)
            assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
            assert_accurate(
                out, reference.rotary_embedding(x, cos, sin, D), reference.rotary_embedding(x, cos, sin, dtype)
            )
            assert torch.equal(out[..., d_rot:], x[..., d_rot:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_is_rotated_as_k(ops, dtype):
    """The bits that kv_cache_update writes."""
    for d, d_rot in ((64, 64), (40, 24), (8, 2), (128, 90)):
        x = torch.randn(2, 9, 3, d).to(dtype)
        cos, sin = torch.randn(2, 1, 9, d_rot).to(dtype).unbind()
        k_cache, v_cache = torch.zeros(2, 3, 9, 1, d, dtype=dtype), torch.zeros(2, 3, 9, 1, 8, dtype=dtype)
        positions = torch.arange(9).expand(2, 9)
        ops.kv_cache_update(
            k_cache, v_cache, x.transpose(1, 2), v_cache[..., 0, :].clone(), positions, cos=cos, sin=sin
        )
        assert torch.equal(ops.rotary_embedding(x, cos, sin), k_cache[..., 0, :].transpose(1, 2))
