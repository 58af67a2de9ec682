"""Loads the compiled ops, and knows why if it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DISABLED = "DIFFQKV_DISABLE_LIBRARY=1"
_NEWEST_OP = "flash_attention_varlen_backward"


def _load() -> tuple[str | None, str | None]:
    """The library's path, or None and the reason."""
    path = Path(__file__).with_name("libdiffqkv.so")
    if os.environ.get("DIFFQKV_DISABLE_LIBRARY") == "1":
        return None, DISABLED
    if not path.is_file():
        return None, f"{path.name} is not in {path.parent}: this installation was not built with CMake"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return None, f"{path} does not load in torch {torch.__version__}: {error}"
    if not hasattr(torch.ops.diffqkv, _NEWEST_OP):
        return None, f"{path} is older than this package: it has no {_NEWEST_OP}; run make build"
    return str(path), None


path, reason = _load()
loaded = path is not None


def has_kernel(op: str, device: str) -> bool:
    """Whether the library contains op for a device type ("cpu", "cuda")."""
    return loaded and torch._C._dispatch_has_kernel_for_dispatch_key(f"diffqkv::{op}", device.upper())


# Device types whose tensors go to the compiled op; "meta" is served by the fake kernels. No CUDA kernel has run on a
# GPU yet, so CUDA is opt-in.
DEVICES = frozenset({"cpu", "meta"}) if loaded else frozenset()
CUDA_UNTESTED = os.environ.get("DIFFQKV_CUDA_UNTESTED") == "1" and has_kernel("kv_cache_update", "cuda")
UPDATE_DEVICES = DEVICES | {"cuda"} if CUDA_UNTESTED else DEVICES
