"""The rules that say when a result is right. Each returns what is wrong with it, as texts."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.itemsize])


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]


def inaccurate(
    name: str, actual: Tensor, exact: Tensor, low: Tensor, factor: float = 2.0, cancelling: float = 0.0
) -> list[str]:
    """The error may be `factor` times that of torch in the dtype of the inputs (`low`), plus a rounding floor.

    exact is float64. NaN and infinities must stand where they stand there. cancelling: how large the terms are that
    may cancel altogether.
    """
    if actual.shape != exact.shape:
        return [f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}"]
    wrong = []
    for what, function in (("NaN", torch.isnan), ("infinities", torch.isinf)):
        if not torch.equal(function(actual), function(exact)):
            got, want = int(function(actual).sum()), int(function(exact).sum())
            wrong.append(f"{name}: {got} {what}, want {want}, or in other places")
    finite = exact.isfinite() & actual.isfinite()
    if wrong or not finite.any():
        return wrong
    eps = torch.finfo(low.dtype).eps
    dtype = low.dtype
    actual, exact, low = (x[finite].double() for x in (actual, exact, low))
    largest = exact.abs().max()
    # Nothing here is more exact than float64, so that there low says nothing about it.
    roundings = {torch.float64: 100, torch.float32: 4}.get(dtype, 2)
    floor = roundings * eps * (cancelling if largest <= eps * cancelling else largest)
    error, allowed = (actual - exact).abs().max(), factor * (low - exact).abs().max() + floor
    if not error <= allowed:
        wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    if largest > eps * cancelling:
        cosine = actual @ exact / (actual.norm() * exact.norm())
        if not cosine > 1 - 100 * eps:
            wrong.append(f"{name}: cosine {cosine:.6f}")
    return wrong


def far(name: str, actual: Tensor, exact: Tensor, tolerance: float = 2e-5) -> list[str]:
    """Results that no rounding of the inputs' dtype excuses: lse, masses."""
    if actual.shape != exact.shape:
        return [f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}"]
    if actual.dtype == torch.float64:
        tolerance = 1e-12
    exact = exact.double()
    right = (actual.double() - exact).abs() <= tolerance * (1 + exact.abs())
    right |= (actual == exact) | (actual.isnan() & exact.isnan())
    if right.all():
        return []
    at = tuple((~right).nonzero()[0].tolist())
    return [f"{name}: {int((~right).sum())} of {right.numel()} wrong, at {at} {actual[at]:.7g}, want {exact[at]:.7g}"]
