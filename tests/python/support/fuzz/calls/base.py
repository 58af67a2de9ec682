"""What all calls share: in which circumstances they are made, and what is compared with the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from diffqkv.ops import dispatch

from .. import oracle
from ..draw import Draw, numbers
from ..oracle import PRECISION, Options, Result


class Mismatch(AssertionError):
    """A result that is not what the documentation says."""


def check(holds: bool, text: str) -> None:
    if not holds:
        raise Mismatch(text)


def close(name: str, actual: Tensor, exact: np.ndarray, allowed: np.ndarray) -> None:
    check(tuple(actual.shape) == exact.shape, f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}")
    got, largest = numbers(actual), PRECISION[actual.dtype].largest
    with np.errstate(invalid="ignore", over="ignore"):
        may_overflow = np.abs(exact) + allowed >= largest  # an infinity or a number, as it comes
        # What is summed up may be infinite of both signs, or infinite times 0.
        may_be_nan = ~(allowed < max(largest, PRECISION[torch.float32].largest))
        errors = np.abs(got - exact)
        right = (errors <= allowed) | (got == exact) | (np.isnan(got) & np.isnan(exact))
    wrong = ~(right | (may_overflow & ~np.isnan(exact) & ~np.isnan(got)) | may_be_nan)
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(errors / np.maximum(allowed, 1e-300), nan=np.inf), -1)
        at = np.unravel_index(excess.argmax(), exact.shape)
        place = [int(n) for n in at]
        raise Mismatch(
            f"{name}{place}: got {got[at]:.9g}, want {exact[at]:.9g} within {allowed[at]:.3g} "
            f"({wrong.sum()} of {wrong.size} elements are wrong)"
        )


def same_bits(name: str, a: Tensor, b: Tensor) -> None:
    check(
        a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}"
    )
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    check(torch.equal(a, b), f"{name}: other bits")


class Circumstances:
    """Whether a call goes to the kernels or to plain torch, and on how many threads."""

    def __init__(self, d: Draw):
        self.kernels = d.chance(0.85)
        self.threads = d.integer(1, 4)
        self.others = d.integer(1, 4) if self.kernels and d.chance(0.3) else None
        d.note(path="kernels" if self.kernels else "plain torch", threads=self.threads)

    def call(self, function: Callable, threads: int | None = None) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or self.threads)
        try:
            if self.kernels:
                return function()
            with mock.patch.object(dispatch, "uses_kernel", lambda *args, **options: False):
                return function()
        finally:
            torch.set_num_threads(before)

    def check_threads(self, function: Callable[[], dict[str, Tensor]], first: dict[str, Tensor]) -> None:
        if self.others is not None:
            for name, x in self.call(function, self.others).items():
                same_bits(f"{name} on {self.others} threads instead of {self.threads}", x, first[name])


def precision_of(dtype: torch.dtype, kernels: bool) -> oracle.Precision:
    """Plain torch rounds more often on its way, to the dtype: scores and each head's share of a gradient."""
    p = PRECISION[dtype]
    if kernels:
        return p
    factor = 1 if dtype in (torch.float32, torch.float64) else 4
    return oracle.Precision(
        sums=4 * p.sums,
        weights=factor * max(p.weights, p.results),
        results=factor * p.results,
        least=factor * p.least,
        largest=p.largest,
        lse=4 * p.sums,
        on_the_way=p.largest,
    )


def oracle_options(
    options: dict[str, Any], d_k: int, sinks: Tensor | None, p: oracle.Precision, exact: bool
) -> Options:
    scale = options.get("softmax_scale")
    return Options(
        precision=p,
        scale=d_k**-0.5 if scale is None else scale,
        exact_scores=exact,
        softcap=options.get("softcap", 0.0),
        sinks=None if sinks is None else numbers(sinks),
        dropped=min(65535, math.floor(options.get("dropout_p", 0.0) * 65536 + 0.5)),
        seed=options.get("seed", 0),
        offset=options.get("offset", 0),
    )


def compare_attention(results: dict[str, Tensor], part: Callable, wanted: list[Result], dsinks: Result) -> None:
    for e, result in enumerate(wanted):
        for name, exact in result.values.items():
            close(f"{name} of entry {e}", part(name, e), exact, result.allowed[name])
    if "dsinks" in results:
        x = results["dsinks"]
        allowed = dsinks.allowed["dsinks"] + PRECISION[x.dtype].results * np.abs(dsinks.values["dsinks"]) + 1e-30
        if x.dtype == torch.float16:
            allowed = allowed + 2**-25
        close("dsinks", x, dsinks.values["dsinks"], allowed)
