"""Inputs with poison in every unused place, and the rule that says when a result is right."""

from __future__ import annotations

import re
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.ops.checks import ArgumentError

HEADS = [(32, 4, 16), (32, 16, 4), (12, 4, 6), (12, 6, 4), (8, 8, 8), (8, 1, 1), (8, 1, 8), (5, 1, 5)]
DIMS = [(64, 64), (32, 64), (64, 128), (128, 64), (40, 56), (8, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINING_DTYPES = [*DTYPES, torch.float64]
LAYOUTS = ["rows", "panels"]
LAYOUT_CODE = {"rows": 0, "panels": 1}
TAILS = ["drop", "renorm", "mean"]
NAN = float("nan")
POISON_BLOCK = 2**31 - 1


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


def strided(x: Tensor, how: str) -> Tensor:
    """x with gaps between tokens, in another order of memory, or in the middle of a larger storage."""
    b, h, s, d = x.shape
    if how == "gaps":
        base = x.new_full((b, h, 2 * s, d + 8), NAN)
        view = base[:, :, ::2, :d]
    elif how == "tokens first":
        view = x.new_empty(b, s, h, d).transpose(1, 2)
    else:
        base = x.new_full((b * h * s * d + 13,), NAN)
        view = base[13:].view(b, h, s, d)
    return view.copy_(x)


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
    b, n_k, capacity, _ = k.shape
    groups = gcd(n_k, v.shape[1])
    slot = torch.arange(capacity)
    first = torch.zeros_like(seqlens) if start is None else start
    empty = ((slot < first[:, None]) | (slot >= seqlens[:, None]))[:, None, :, None]
    k, v = k.masked_fill(empty, NAN), v.masked_fill(empty, NAN)
    if block_size is None:
        k_pages, v_pages, block_table = k, v, None
    else:
        blocks = -(-capacity // block_size)
        pool = 2 * b * blocks
        table = torch.randperm(pool)[: b * blocks].view(b, blocks)

        def pages(x: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * block_size - capacity), value=NAN)
            out = x.new_full((pool, x.shape[1], block_size, x.shape[3]), NAN)
            out[table] = padded.unflatten(2, (blocks, block_size)).transpose(1, 2)
            return out

        k_pages, v_pages = pages(k), pages(v)
        begin = torch.arange(blocks) * block_size
        unused = (begin >= seqlens[:, None]) | (begin + block_size <= first[:, None]) | (first >= seqlens)[:, None]
        block_table = torch.where(unused, POISON_BLOCK, table).int()
    if layout == "rows":
        k_cache = reference.group(k_pages, groups)
    else:
        k_cache = reference.rows_to_panels(k_pages)
        behind = torch.arange(k_pages.shape[2], k_cache.shape[2] * 32)
        if k.dtype == torch.bfloat16:
            k_cache[:, :, behind // 32, :, behind % 32, :] = NAN
        else:
            k_cache[:, :, behind // 32, :, behind % 32] = NAN
    return CacheCase(k, v, k_cache, reference.group(v_pages, groups), seqlens, start, block_table, layout)


def assert_accurate(actual: Tensor, exact: Tensor, low: Tensor, factor: float = 2.0) -> None:
    """The error is at most `factor` times that of torch in the dtype of `actual` (`low`), plus a rounding floor.

    exact is computed in float64. NaN and infinities must stand where they stand there.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, want {list(exact.shape)}"
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in other places than in the reference"
    assert torch.equal(actual.isinf(), exact.isinf()), "infinities in other places than in the reference"
    finite = exact.isfinite()
    if not finite.any():
        return
    dtype, eps = actual.dtype, torch.finfo(actual.dtype).eps
    actual, exact, low = (x[finite].double() for x in (actual, exact, low))
    # Nothing here is more exact than float64, so that low says nothing about it. In float32 torch's sums of blocks can
    # be exact by luck, where an order of sums of our own rounds as it must.
    floor = {torch.float64: 100, torch.float32: 8}.get(dtype, 2) * eps * exact.abs().max()
    error, allowed = (actual - exact).abs().max(), factor * (low - exact).abs().max() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} (torch in the same precision plus rounding)"
    if exact.norm() > 0:
        cosine = actual @ exact / (actual.norm() * exact.norm())
        assert cosine > 1 - 100 * eps, f"cosine {cosine}"


def assert_lse(actual: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """lse of 16-bit inputs is float32: it sums weights before they are rounded to the inputs' dtype."""
    assert actual.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual.double(), exact.double(), atol=tolerance, rtol=tolerance)


def assert_refusal(error: Exception, kind: type[Exception], name: str) -> None:
    """error names the argument; a wrong value is a ValueError and, as torch has it, a RuntimeError."""
    assert type(error) is (ArgumentError if kind is ValueError else kind)
    assert re.fullmatch(rf"({name}): got .+, want .+", str(error)), str(error)
