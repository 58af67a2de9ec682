"""Inputs with poison in every unused place, and assertions; the benchmarks share the accuracy rule."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from diffqkv import quantization, reference
from diffqkv.benchmarks.common.accuracy import far, inaccurate
from diffqkv.benchmarks.common.inputs import (  # noqa: F401  tests import them from here
    HEADS,
    NAN,
    UNUSED_BLOCK,
    as_caches,
    in_pages,
    poison_absent,
    poison_unneeded,
    strided,
)
from diffqkv.ops.checks import ArgumentError

DIMS = [(64, 64), (32, 64), (64, 128), (128, 64), (40, 56), (8, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINING_DTYPES = [*DTYPES, torch.float64]
LAYOUTS = ["rows", "panels"]
LAYOUT_CODE = {"rows": 0, "panels": 1}
TAILS = ["drop", "renorm", "mean"]
POISON_BLOCK = UNUSED_BLOCK
WITHOUT_CUDA_KERNEL = {"packed_linear", "rms_norm", "rotary_embedding"}  # ops that plain torch computes on every GPU


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(b, heads, s_q, s_k, dims, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q `[b, n_q, s_q, d_k]`, k `[b, n_k, s_k, d_k]`, v `[b, n_v, s_k, d_v]`."""
    (n_q, n_k, n_v), (d_k, d_v) = heads, dims
    return (
        torch.randn(b, n_q, s_q, d_k).to(dtype),
        torch.randn(b, n_k, s_k, d_k).to(dtype),
        torch.randn(b, n_v, s_k, d_v).to(dtype),
    )


class CacheCase(NamedTuple):
    """A cache, and the same tokens as dense K and V."""

    k: Tensor  # [b, n_k, capacity, d_k]
    v: Tensor  # [b, n_v, capacity, d_v]
    k_cache: Tensor
    v_cache: Tensor
    seqlens: Tensor
    start: Tensor | None
    block_table: Tensor | None
    layout: str

    @property
    def options(self) -> dict:
        """Keyword arguments of the ops."""
        return {
            "cache_start": self.start,
            "block_table": self.block_table,
            "k_layout": LAYOUT_CODE[self.layout],
        }

    @property
    def reference_options(self) -> dict:
        return self.options | {"k_layout": self.layout}


def cache_of(k, v, seqlens, *, layout="rows", start=None, block_size=None) -> CacheCase:
    """Puts k `[b, n_k, capacity, d_k]` and v `[b, n_v, capacity, d_v]` into a cache.

    Slots outside [start, seqlens) become NaN; with block_size the pages are shuffled, twice as many as needed, and
    block-table entries that no token needs hold a huge number.
    """
    b, capacity = k.shape[0], k.shape[2]
    k, v = (poison_absent(x, seqlens, start) for x in (k, v))
    pages, block_table = (k, v), None
    if block_size is not None:
        blocks = -(-capacity // block_size)
        pool = 2 * b * blocks
        table = torch.randperm(pool)[: b * blocks].view(b, blocks)
        pages = tuple(in_pages(x, table, block_size, pool) for x in (k, v))
        block_table = poison_unneeded(table, block_size, seqlens, start)
    k_cache, v_cache = as_caches(*pages)
    if layout == "panels":
        k_cache = reference.rows_to_panels(pages[0])
        unused = torch.arange(pages[0].shape[2], k_cache.shape[2] * 32)
        if k.dtype == torch.bfloat16:
            k_cache[:, :, unused // 32, :, unused % 32, :] = NAN
        else:
            k_cache[:, :, unused // 32, :, unused % 32] = NAN
    return CacheCase(k, v, k_cache, v_cache, seqlens, start, block_table, layout)


class LinearWeights(NamedTuple):
    """Weights of a linear layer, as `packed_linear` takes them."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None


WEIGHTS = [("own", False), ("int8", False), ("int8", True), ("int4", False), ("int4", True)]  # form, with zeros


def linear_weights(form, n, k, dtype=torch.float32, zeros=False, group_size=32) -> LinearWeights:
    """Random ones `[n, k]`; of the last panel, what no output feature needs is NaN, or has scales of NaN."""
    panels, lanes = -(-n // quantization.PANEL), torch.arange(-(-n // 32) * 32).view(-1, 32)
    if form == "own":
        weight = quantization.pack(torch.randn(n, k).to(dtype))
        at = (-1, slice(None), lanes[-1] >= n)
        weight[at] = NAN
        return LinearWeights(weight, None, None)
    least, most = (-128, 127) if form == "int8" else (-8, 7)
    integers = torch.randint(least, most + 1, (n, k), dtype=torch.int8)
    weight = quantization.pack(integers) if form == "int8" else quantization.pack_int4(integers)
    scales, offsets = torch.randn(2, panels, k // group_size, 32).unbind()
    scales[-1, :, lanes[-1] >= n] = NAN
    kind = dtype if dtype != torch.float32 else torch.bfloat16
    return LinearWeights(weight, (scales / most).to(kind), offsets.to(kind) if zeros else None)


def assert_linear(out: Tensor, x: Tensor, n: int, w: LinearWeights, bias: Tensor | None, kernel: bool) -> None:
    """out is what `packed_linear` says; integer weights round float32, too."""
    options = {"scales": w.scales, "zeros": w.zeros, "bias": bias}
    exact, low = (reference.packed_linear(x, w.weight, n, dtype=to, **options) for to in (torch.float64, x.dtype))
    if w.scales is None or not kernel or x.dtype != torch.float32:
        assert_accurate(out, exact, low)
        return
    assert out.dtype == x.dtype and out.shape == exact.shape
    dense = quantization.dequantize(w.weight, n, w.scales, w.zeros, torch.float64).unflatten(1, (w.scales.shape[1], -1))
    largest = x.double().abs().unflatten(-1, (w.scales.shape[1], -1)).amax(-1).clamp_min(1e-30)
    rounding = 1.6e-5 * largest @ dense.abs().sum(-1).T
    assert ((out - exact).abs() <= rounding + 1e-5 * (1 + exact.abs())).all()


def assert_accurate(actual: Tensor, exact: Tensor, low: Tensor, factor: float = 2.0) -> None:
    """The rule of `diffqkv.benchmarks.common.accuracy.inaccurate`."""
    assert not (wrong := inaccurate("result", actual, exact, low, factor)), wrong


def assert_lse(actual: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """lse of 16-bit inputs is float32: it sums weights before they are rounded to the inputs' dtype."""
    assert actual.dtype == dtype
    assert not (wrong := far("lse", actual, exact)), wrong


def assert_refusal(error: Exception, kind: type[Exception], name: str) -> None:
    """error names the argument; a wrong value is a ValueError and, as torch has it, a RuntimeError."""
    assert type(error) is (ArgumentError if kind is ValueError else kind)
    assert re.fullmatch(rf"({name}): got .+, want .+", str(error)), str(error)
