"""torch.autocast of the compiled ops: those that cast compute in its dtype.

`torch.library.register_autocast` knows one dtype, whatever autocast's is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import CAST, cast_inputs
from ..op import Op

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_LIBRARY = torch.library.Library("diffqkv", "IMPL")


def _register(op: Op, device: str, key: str) -> None:
    names = [argument.name for argument in op.kernel._schema.arguments]

    def kernel(*args: Any, **options: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | options  # the dispatcher leaves defaults out
        dtype = torch.get_autocast_dtype(device)
        inputs.update(zip(CAST, cast_inputs(dtype, *(inputs.get(x) for x in CAST)), strict=True))
        with torch.autocast(device, enabled=False):
            return op.kernel(**inputs)

    _LIBRARY.impl(op.name, kernel, key)


def register(op: Op) -> None:
    if op.casts:
        for device, key in _KEYS.items():
            _register(op, device, key)
