"""torch.autocast: the training attention computes in autocast's dtype, as scaled_dot_product_attention does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def _cast_inputs(device: str, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """q, k, v in autocast's dtype, float64 excepted; sinks may stay float32."""
    dtype = torch.get_autocast_dtype(device)
    sinks = options.get("sinks")
    if isinstance(sinks, Tensor) and sinks.dtype != torch.float32:
        options = options | {"sinks": _cast(sinks, dtype)}
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype), options


def autocasts(attention: Callable) -> Callable:
    """A plain-torch attention(q, k, v, ...) that does under autocast what the op does, its own products included."""

    @wraps(attention)
    def wrapped(q, k, v, *args, **options):
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return attention(q, k, v, *args, **options)
        q, k, v, options = _cast_inputs(device, q, k, v, options)
        with torch.autocast(device, enabled=False):
            return attention(q, k, v, *args, **options)

    return wrapped
