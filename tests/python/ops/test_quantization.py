"""diffqkv.quantization: panels hold what was packed, integers are the best that a scale allows, errors come first."""

import pytest
import torch
from helpers import DTYPES, NAN, assert_refusal

import diffqkv
from diffqkv import quantization, reference

SIZES = [(1, 32), (31, 64), (32, 8), (33, 96), (70, 32), (128, 40)]


def unpacked_by_the_reference(packed, n, k):
    """The product with each unit vector is a column of the weights."""
    scales = torch.ones(len(packed), k // 8, 32) if packed.dtype in (torch.int8, torch.uint8) else None
    dtype = torch.float32 if scales is not None else packed.dtype
    return reference.packed_linear(torch.eye(k, dtype=dtype), packed, n, scales=scales, dtype=torch.float64).T


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_hold_the_weights(n, k, dtype):
    weight = torch.randn(n, k).to(dtype)
    packed = quantization.pack(weight)
    panels = -(-n // 32)
    assert packed.shape == ((panels, k // 2, 32, 2) if dtype == torch.bfloat16 else (panels, k, 32))
    assert packed.dtype == dtype and packed.is_contiguous()
    assert torch.equal(quantization.unpack(packed, n), weight)
    assert torch.equal(unpacked_by_the_reference(packed, n, k), weight.double())
    assert (quantization.unpack(packed, 32 * panels)[n:] == 0).all()


@pytest.mark.parametrize("n, k", SIZES)
def test_panels_hold_the_integers(n, k):
    for bits, pack, shape in ((8, quantization.pack, (k // 2, 32, 2)), (4, quantization.pack_int4, (k // 8, 32, 4))):
        half = 1 << (bits - 1)
        integers = torch.randint(-half, half, (n, k), dtype=torch.int8)
        integers[0, :8] = torch.tensor([-half, half - 1, 0, -1, 1, -half, half - 1, half - 2])
        packed = pack(integers)
        assert packed.shape == (-(-n // 32), *shape) and packed.is_contiguous()
        assert packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
        unpacked = quantization.unpack(packed, n)
        assert unpacked.dtype == torch.int8 and torch.equal(unpacked, integers)
        assert torch.equal(unpacked_by_the_reference(packed, n, k), integers.double())


def test_every_integer_of_every_place_of_four_bits():
    for place in range(8):
        integers = torch.zeros(16, 8, dtype=torch.int8)
        integers[:, place] = torch.arange(-8, 8)
        packed = quantization.pack_int4(integers)
        assert torch.equal(quantization.unpack(packed, 16), integers)
        # As the documentation has it: bits 4 j of 16-bit half h are input feature 2 j + h.
        half, j = place % 2, place // 2
        word = packed[0, 0, :16, 2 * half].int() + 256 * packed[0, 0, :16, 2 * half + 1].int()
        assert torch.equal((word >> (4 * j) & 15) - 8, torch.arange(-8, 8, dtype=torch.int32))


@pytest.mark.parametrize("n", [1, 32, 45])
def test_panels_hold_the_scales(n):
    scales = torch.randn(n, 3)
    packed = quantization.pack_groups(scales)
    assert packed.shape == (-(-n // 32), 3, 32) and packed.is_contiguous()
    assert torch.equal(quantization.unpack_groups(packed, n), scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", quantization.GROUP_SIZES)
def test_integers_are_the_nearest(bits, group_size):
    """No other integer of so many bits is nearer, for the scale of the group."""
    weight = torch.randn(13, 2 * group_size) * torch.logspace(-8, 3, 13)[:, None]
    integers, scales = quantization.quantize(weight, bits, group_size)
    assert integers.dtype == torch.int8 and scales.dtype == torch.bfloat16 and scales.shape == (13, 2)
    half = 1 << (bits - 1)
    assert int(integers.min()) >= -half and int(integers.max()) < half
    exact = scales.double().repeat_interleave(group_size, 1)
    errors = (exact * integers - weight).abs()
    each = (exact[..., None] * torch.arange(-half, half) - weight[..., None].double()).abs()
    assert (errors <= each.amin(-1) + 1e-6 * weight.abs()).all()
    # The largest weight is an end of the integers, beyond which half a step may lie, and a whole one on the other side.
    if bits == 8:
        assert (errors <= 1.5 * exact.abs()).all()


def squared_errors(weight, integers, scales):
    """Of groups of 32, float64 `[n, groups]`."""
    exact = integers.double().unflatten(1, (-1, 32)) * scales.double()[..., None]
    return (exact - weight.double().unflatten(1, (-1, 32))).square().sum(-1)


def test_scales_of_four_bits_are_near_the_best():
    """In the mean square, a search of 400 scales of both signs finds little that is nearer."""
    weight = torch.randn(40, 4 * 32)
    weight[20:] = weight[20:].pow(3)
    errors = squared_errors(weight, *quantization.quantize(weight, 4, 32))
    groups = weight.double().unflatten(1, (4, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    fitting, best = None, torch.full((40, 4), torch.inf, dtype=torch.float64)
    for share in (1.0, *torch.linspace(0.5, 1.2, 200).tolist(), *torch.linspace(-1.2, -0.5, 200).tolist()):
        scale = (largest / -8 * share).bfloat16().double()
        tried = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
        fitting = tried if fitting is None else fitting
        best = torch.minimum(best, tried)
    assert (errors <= fitting * (1 + 1e-5)).all()
    assert (errors / best).mean() < 1.06 < 1.1 < (fitting / best).mean()
    assert (errors >= best * (1 - 1e-5)).float().mean() > 0.9  # or the search above would say little


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("power", [-84, -115, 84, 123])
def test_any_size_of_weights_is_quantized_as_well(bits, power):
    """Powers of two: 1e-25, 2e-35, 1e25 and 1e37, whose squares float32 does not hold."""
    weight = torch.randn(50, 96)
    integers, scales = quantization.quantize(weight, bits)
    got = quantization.quantize(weight * 2.0**power, bits)
    assert torch.equal(got[0], integers) and torch.equal(got[1], scales * 2.0**power)
    odd = torch.tensor([1e-25, 3e-30, 1e20, 1e25]).repeat(13)[:50, None] * weight  # no power of two, and side by side
    relative = squared_errors(odd, *quantization.quantize(odd, bits)) / odd.double().unflatten(1, (3, 32)).square().sum(
        -1
    )
    ordinary = squared_errors(weight, integers, scales) / weight.double().unflatten(1, (3, 32)).square().sum(-1)
    assert relative.mean() < 1.05 * ordinary.mean()
    assert relative.max() < (2e-4 if bits == 8 else 0.03)


def test_dequantized_weights():
    weight = torch.randn(45, 96)
    for bits, pack, share in ((8, quantization.pack, 2**-6), (4, quantization.pack_int4, 0.25)):
        integers, scales = quantization.quantize(weight, bits)
        zeros = torch.randn(45, 3)
        panels = (pack(integers), 45, quantization.pack_groups(scales.float()))
        for zero, packed in ((0.0, None), (zeros.repeat_interleave(32, 1), quantization.pack_groups(zeros))):
            dense = quantization.dequantize(*panels, packed, torch.float32)
            assert torch.equal(dense, integers * scales.float().repeat_interleave(32, 1) + zero)
            assert (dense - weight - zero).abs().max() < share * weight.abs().max()


@pytest.mark.parametrize("bits, pack", [(8, quantization.pack), (4, quantization.pack_int4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_layer_is_near_the_layer(dtype, bits, pack):
    weight, x = torch.randn(70, 256).to(dtype), torch.randn(5, 256).to(dtype)
    integers, scales = quantization.quantize(weight, bits)
    out = diffqkv.packed_linear(x, pack(integers), 70, scales=quantization.pack_groups(scales))
    want = x.float() @ weight.float().T
    assert (out.float() - want).norm() < (0.01 if bits == 8 else 0.15) * want.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_zero_and_of_any_size(bits):
    integers, scales = quantization.quantize(torch.zeros(3, 64), bits)
    assert (integers == 0).all() and (scales == 0).all()
    integers, _ = quantization.quantize(torch.zeros(0, 64), bits)
    assert integers.shape == (0, 64)
    weight = torch.randn(5, 64)
    weight[:, :32] *= torch.tensor([1e37, 1e-34, 1e-41, 1e-45, 0])[:, None]
    integers, scales = quantization.quantize(weight, bits)
    assert scales.isfinite().all()
    dense = integers * scales.float().repeat_interleave(32, 1)
    largest = weight.unflatten(1, (2, 32)).abs().amax(-1).repeat_interleave(32, 1)
    # Below the normal numbers of bfloat16 a scale has few digits, or none.
    assert ((dense - weight).abs() <= largest * (2**-6 if bits == 8 else 0.25) + 1e-38).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_large_weights_are_quantized_in_parts(bits, monkeypatch):
    weight = torch.randn(100, 64)
    want = quantization.quantize(weight, bits)
    for block in (1, 64 * 7, 64 * 99):
        monkeypatch.setattr(quantization, "_BLOCK", block)
        assert all(map(torch.equal, quantization.quantize(weight, bits), want))


def test_dtypes_and_parameters():
    weight = torch.randn(40, 64).bfloat16()
    want = quantization.quantize(weight, 4)
    for same in (weight.float(), weight.double(), torch.nn.Parameter(weight)):
        integers, scales = quantization.quantize(same, 4)
        assert torch.equal(integers, want[0]) and torch.equal(scales, want[1])
        assert not scales.requires_grad


def test_meta_tensors():
    """A model that has no memory yet: shapes and dtypes as of weights."""
    weight = torch.randn(45, 64)
    for bits, pack in ((8, quantization.pack), (4, quantization.pack_int4)):
        panels = []
        for x in (weight, weight.to("meta")):
            integers, scales = quantization.quantize(x, bits)
            packed, groups = pack(integers), quantization.pack_groups(scales)
            dense = quantization.dequantize(packed, 45, groups, None, torch.bfloat16)
            panels.append((integers, scales, packed, groups, dense, quantization.pack(x)))
        for real, meta in zip(*panels, strict=True):
            assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype == real.dtype


WRONG = [
    ("pack", (torch.randn(3, 5).bfloat16(),), ValueError, "weight"),
    ("pack", (torch.zeros(3, 5, dtype=torch.int8),), ValueError, "weight"),
    ("pack", (torch.randn(3, 4).double(),), TypeError, "weight"),
    ("pack", (torch.zeros(3, 4, dtype=torch.uint8),), TypeError, "weight"),
    ("pack", (torch.randn(4),), ValueError, "weight"),
    ("pack", (torch.randn(2, 3, 4),), ValueError, "weight"),
    ("pack", ([[1.0]],), TypeError, "weight"),
    ("pack", (torch.randn(3, 4).to_sparse(),), TypeError, "weight"),
    ("pack_int4", (torch.zeros(3, 12, dtype=torch.int8),), ValueError, "integers"),
    ("pack_int4", (torch.zeros(3, 8, dtype=torch.int32),), TypeError, "integers"),
    ("pack_int4", (torch.full((3, 8), 8, dtype=torch.int8),), ValueError, "integers"),
    ("pack_int4", (torch.full((3, 8), -9, dtype=torch.int8),), ValueError, "integers"),
    ("quantize", (torch.randn(3, 64), 3), ValueError, "bits"),
    ("quantize", (torch.randn(3, 64), 16), ValueError, "bits"),
    ("quantize", (torch.randn(3, 64), 8, 48), ValueError, "group_size"),
    ("quantize", (torch.randn(3, 64), 8, 0), ValueError, "group_size"),
    ("quantize", (torch.randn(3, 1024), 8, 512), ValueError, "group_size"),
    ("quantize", (torch.randn(3, 96), 8, 64), ValueError, "group_size"),
    ("quantize", (torch.randn(3, 0), 8, 32), ValueError, "group_size"),
    ("quantize", (torch.randn(64), 8), ValueError, "weight"),
    ("quantize", (torch.zeros(3, 64, dtype=torch.int8), 8), TypeError, "weight"),
    ("quantize", (torch.full((3, 64), 1e300, dtype=torch.float64), 8), ValueError, "weight"),
    *[("quantize", (torch.full((2, 64), bad), bits), ValueError, "weight")
      for bits in (8, 4) for bad in (NAN, torch.inf, -torch.inf)],
]  # fmt: skip


@pytest.mark.parametrize("name, args, error, argument", WRONG, ids=[f"{i}-{x[0]}-{x[3]}" for i, x in enumerate(WRONG)])
def test_wrong_arguments(name, args, error, argument):
    with pytest.raises(error) as caught:
        getattr(quantization, name)(*args)
    assert_refusal(caught.value, error, argument)


def test_one_weight_that_is_no_number(monkeypatch):
    """It is found wherever it lies, before anything is computed."""
    monkeypatch.setattr(quantization, "_BLOCK", 64)
    monkeypatch.setattr(quantization, "_quantize_rows", None)
    for row, bad in ((0, NAN), (7, torch.inf), (9, -torch.inf)):
        weight = torch.randn(10, 64)
        weight[row, 33] = bad
        with pytest.raises(ValueError, match=rf"^weight: got {bad}, want finite numbers$"):
            quantization.quantize(weight, 8)
