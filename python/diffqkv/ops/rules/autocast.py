"""torch.autocast: the training attention computes in autocast's dtype, as scaled_dot_product_attention does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import library

CAST_OPS = ("flash_attention", "flash_attention_varlen")
_CAST = ("q", "k", "v", "sinks")
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def compute_dtype(op: str, x: Tensor) -> torch.dtype:
    """The dtype in which op computes on x."""
    casts = op in CAST_OPS and x.is_floating_point() and x.dtype != torch.float64
    dtype = autocast_dtype(x.device.type) if casts else None
    return x.dtype if dtype is None else dtype


def cast(x: Any, dtype: torch.dtype) -> Any:
    """x in dtype, if it is a floating-point tensor and not of float64."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def _cast_inputs(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Any, Any, Any, Any]:
    """The tensors in dtype; sinks of float32 stay so."""
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = cast(sinks, dtype)
    return cast(q, dtype), cast(k, dtype), cast(v, dtype), sinks


# ---- plain torch -----------------------------------------------------------------------------------------------------


def outside_autocast(function: Callable) -> Callable:
    """function(q, ...), whose own products keep their precision under autocast."""

    @wraps(function)
    def wrapped(q, *args, **options):
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        dtype = autocast_dtype(device)
        if dtype is None:
            return function(q, *args, **options)
        if function.__name__ in CAST_OPS:
            q, k, v, sinks = _cast_inputs(dtype, q, *args[:2], options.get("sinks"))
            args, options = (k, v, *args[2:]), options | {"sinks": sinks}
        with torch.autocast(device, enabled=False):
            return function(q, *args, **options)

    return wrapped


# ---- the compiled ops ------------------------------------------------------------------------------------------------


def _register(name: str, device: str, key: str) -> None:
    op = getattr(torch.ops.diffqkv, name).default
    names = [argument.name for argument in op._schema.arguments]

    def kernel(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(names, args, strict=False)) | options  # the dispatcher leaves defaults out
        dtype = torch.get_autocast_dtype(device)
        inputs.update(zip(_CAST, _cast_inputs(dtype, *(inputs.get(x) for x in _CAST)), strict=True))
        with torch.autocast(device, enabled=False):
            return op(**inputs)

    _LIBRARY.impl(name, kernel, key)


if library.loaded:
    # torch.library.register_autocast knows one dtype, whatever autocast's is.
    _LIBRARY = torch.library.Library("diffqkv", "IMPL")
    for _name in CAST_OPS:
        for _device, _key in _KEYS.items():
            _register(_name, _device, _key)
