"""What callers of the public functions may pass, as the schemas have it; and what no op takes."""

from __future__ import annotations

import operator
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import wrong

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def as_choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    """The number that the schemas have for the string."""
    if not isinstance(value, str):
        raise wrong(name, type(value).__name__, "a str", TypeError)
    if value not in choices:
        raise wrong(name, repr(value), " or ".join(map(repr, choices)))
    return choices.index(value)


def _index(name: str, value: SupportsIndex) -> int:
    """value as an int, where it is none of Python's: a numpy integer, an integer tensor without dimensions."""
    if torch.compiler.is_compiling():  # which has no value to read
        raise wrong(name, f"{type(value).__name__} in compiled code", "an int: convert it outside", TypeError)
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"Tensor of {value.dtype}, shape {list(value.shape)}"
        is_index = value.dim() == 0 and value.dtype != torch.bool
    else:
        is_index = not isinstance(value, bool)
    try:
        if is_index:
            return operator.index(value)
    except TypeError:
        pass
    raise wrong(name, got, "an int", TypeError)


def as_integer(name: str, value: SupportsIndex, low: int, high: int = 2**63 - 1) -> int:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        value = _index(name, value)
    if value < low or value > high:
        raise wrong(name, value, f"an integer >= {low}" if high == 2**63 - 1 else f"an integer from {low} to {high}")
    return value


def as_number(name: str, value: float) -> float:
    """value, as a float if it is none of Python's numbers: one of numpy's, a tensor without dimensions."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return value
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        is_real = value.dim() == 0 and (value.is_floating_point() or value.dtype in _INTEGERS)
    if not is_real:
        raise wrong(name, type(value).__name__, "a number", TypeError)
    return float(value)


def as_scale(softmax_scale: float | None) -> float | None:
    return None if softmax_scale is None else as_number("softmax_scale", softmax_scale)


def as_window(window: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)):
        raise wrong("window", type(window).__name__, "a tuple (left, right)", TypeError)
    if len(window) != 2:
        raise wrong("window", window, "two integers, left and right")
    left, right = (as_integer("window", n, -1) for n in window)
    return left, right


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """Refuses what an op for inference would be differentiated by, in either mode."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise wrong(name, "requires_grad=True in grad mode", f"torch.no_grad(): {op} is for inference only")
    refuse_forward_mode(op, *tensors.values())


def may_have_tangents() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Refuses tensors with tangents, for which torch would take the compiled ops for constants."""
    if torch.compiler.is_compiling() or not may_have_tangents():
        return
    for x in tensors:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode differentiation is not built")
