"""Loads the compiled ops, and knows why if it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

DISABLED = "DIFFQKV_DISABLE_LIBRARY=1"
LIBRARY = "DIFFQKV_LIBRARY"


def _load() -> tuple[str | None, str | None]:
    """The library's path, or None and the reason."""
    path = Path(os.environ.get(LIBRARY) or Path(__file__).parents[1] / "libdiffqkv.so")
    if os.environ.get("DIFFQKV_DISABLE_LIBRARY") == "1":
        return None, DISABLED
    if not path.is_file():
        if LIBRARY in os.environ:
            return None, f"{LIBRARY}: got {path}, want a file"
        return None, f"{path.name} is not in {path.parent}: this installation was not built with CMake"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return None, f"{path} does not load in torch {torch.__version__}: {error}"
    return str(path), None


path, reason = _load()
loaded = path is not None


def kernel(op: str) -> Callable | None:
    """The compiled op; None without the library. One that does not have it is too old, and is not used at all."""
    global path, reason, loaded
    if not loaded:
        return None
    if not hasattr(torch.ops.diffqkv, op):
        reason = f"{path} is older than this package: it has no {op}; run make build"
        path, loaded = None, False
        return None
    return getattr(torch.ops.diffqkv, op).default


def has_kernel(op: str, device: str) -> bool:
    """Whether the library contains op for a device type ("cpu", "cuda")."""
    return loaded and torch._C._dispatch_has_kernel_for_dispatch_key(f"diffqkv::{op}", device.upper())
