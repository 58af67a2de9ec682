"""torch.autocast: the training attention computes in autocast's dtype, as scaled_dot_product_attention does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

CAST = ("q", "k", "v", "sinks")


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x after the cast of an op that casts."""
    dtype = autocast_dtype(x.device.type) if x.is_floating_point() and x.dtype != torch.float64 else None
    return x.dtype if dtype is None else dtype


def cast(x: Any, dtype: torch.dtype) -> Any:
    """x in dtype, if it is a floating-point tensor and not of float64."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def cast_inputs(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """The tensors `CAST` in dtype; sinks of float32 stay so."""
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = cast(sinks, dtype)
    return cast(q, dtype), cast(k, dtype), cast(v, dtype), sinks


def _dtype_around(q: Any) -> torch.dtype | None:
    return autocast_dtype(q.device.type if isinstance(q, Tensor) else "cpu")


def with_cast_inputs(function: Callable) -> Callable:
    """function(q, k, v, ..., sinks=...), whose inputs are cast under autocast."""

    @wraps(function)
    def wrapped(q, k, v, *args, **options):
        if (dtype := _dtype_around(q)) is not None:
            q, k, v, sinks = cast_inputs(dtype, q, k, v, options.get("sinks"))
            options = options | {"sinks": sinks}
        return function(q, k, v, *args, **options)

    return wrapped


def outside_autocast(function: Callable) -> Callable:
    """function(q, ...), whose own products keep their precision under autocast."""

    @wraps(function)
    def wrapped(q, *args, **options):
        if _dtype_around(q) is None:
            return function(q, *args, **options)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **options)

    return wrapped
