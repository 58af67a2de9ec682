"""torch.autocast: the training attention computes in autocast's dtype, as scaled_dot_product_attention does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import _library

_OPS = ("flash_attention", "flash_attention_varlen")
_CAST = ("q", "k", "v", "sinks")
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def _cast_inputs(device: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """float64 stays what it is, and sinks may be float32."""
    dtype = torch.get_autocast_dtype(device)
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = _cast(sinks, dtype)
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype), sinks


# ---- plain torch -----------------------------------------------------------------------------------------------------


def outside_autocast(function: Callable) -> Callable:
    """function(q, ...), whose own products keep their precision under autocast."""

    @wraps(function)
    def wrapped(q, *args, **options):
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(q, *args, **options)
        if function.__name__ in _OPS:
            q, k, v, sinks = _cast_inputs(device, q, *args[:2], options.get("sinks"))
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
        inputs.update(zip(_CAST, _cast_inputs(device, *(inputs.get(x) for x in _CAST)), strict=True))
        with torch.autocast(device, enabled=False):
            return op(**inputs)

    _LIBRARY.impl(name, kernel, key)


if _library.loaded:
    # torch.library.register_autocast knows one dtype, whatever autocast's is.
    _LIBRARY = torch.library.Library("diffqkv", "IMPL")
    for _name in _OPS:
        for _device, _key in _KEYS.items():
            _register(_name, _device, _key)
