"""When a result is right: one rule for the tests, the check on a GPU and the benchmarks.

`inaccurate` and `far` return what is wrong, as texts; `difference` and `distance` are the errors that stand in a line
of a benchmark, where a second result in lower precision would cost more than the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.itemsize])


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names in `a` whose tensors have other bits in `b`."""
    return [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]


def inaccurate(
    name: str, actual: Tensor, exact: Tensor, low: Tensor, factor: float = 2.0, cancelling: float = 0.0
) -> list[str]:
    """The error may be `factor` times that of torch in the dtype of `actual` (`low`), plus a rounding floor.

    exact is computed in float64. NaN and infinities must stand where they stand there. cancelling: the size of the
    terms, where they may cancel altogether.
    """
    if actual.shape != exact.shape:
        return [f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}"]
    wrong = []
    for what, function in (("NaN", torch.isnan), ("infinities", torch.isinf)):
        if not torch.equal(function(actual), function(exact)):
            got, want = int(function(actual).sum()), int(function(exact).sum())
            wrong.append(f"{name}: {got} {what}, want {want}, or they stand in other places")
    finite = exact.isfinite()
    if wrong or not finite.any():
        return wrong
    dtype, eps = actual.dtype, torch.finfo(actual.dtype).eps
    actual, exact, low = (x[finite].double() for x in (actual, exact, low))
    largest = exact.abs().max()
    # Nothing here is more exact than float64, so that low says nothing about it. In float32 torch's sums of blocks can
    # be exact by luck, where an order of sums of our own rounds as it must.
    roundings = {torch.float64: 100, torch.float32: 8}.get(dtype, 2)
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
    """The rule for lse and masses, which are float32 for 16-bit inputs: no rounding of the inputs excuses an error."""
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


def worst(errors: Sequence[float]) -> float:
    """The largest of the errors. Unlike max(), it keeps a NaN."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def difference(got: Tensor | Sequence[Tensor], want: Tensor | Sequence[Tensor]) -> float:
    """The largest error of an element, relative to that element or, where it is smaller, to 1 or the largest element.

    So the error of a small element cannot hide behind a large one, nor that of small results behind an absolute
    tolerance. It is NaN where there is one, or another shape. Of several results the worst counts.
    """
    if not isinstance(got, Tensor):
        return worst([difference(x, y) for x, y in zip(got, want, strict=True)])
    if got.shape != want.shape:
        return float("nan")
    dtype = torch.promote_types(torch.promote_types(got.dtype, want.dtype), torch.float32)
    got, want = got.to(dtype), want.to(dtype)
    size = want.abs()
    return ((got - want).abs() / size.clamp_min(size.max().clamp(1e-30, 1))).max().item()


def distance(got: Tensor, want: Tensor) -> float:
    """The norm of the error relative to that of `want`, for results of equal right: a peer's, or a whole model's."""
    if got.shape != want.shape:
        return float("nan")
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
