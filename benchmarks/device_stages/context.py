"""What a stage is given: the device, the op, the reference, and a place for its results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def load_reference() -> ModuleType:
    """`diffqkv.reference` by its file, without the package, which would load a library of its own."""
    path = REPOSITORY / "python" / "diffqkv" / "reference.py"
    spec = importlib.util.spec_from_file_location("diffqkv_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Context:
    """`result` is what the stage reports; `save` keeps it in case the stage does not come to its end."""

    def __init__(self, library: Path, device: str, write: Callable[[dict], None]):
        self.library = library
        self.device = torch.device(device)
        self.failures: list[str] = []
        self.result: dict = {}
        self._write = write

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def load_op(self) -> Callable[..., None]:
        """kv_cache_update of the library; an error if it has none for this device."""
        torch.ops.load_library(self.library)
        key = self.device.type.upper()
        if not torch._C._dispatch_has_kernel_for_dispatch_key("diffqkv::kv_cache_update", key):
            raise RuntimeError(f"{self.library} has no {key} kernel of kv_cache_update")
        return torch.ops.diffqkv.kv_cache_update.default

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.save()

    def save(self) -> None:
        partial = {"status": "error", "reason": "ended early"} | self.result
        self._write(partial | {"failures": self.failures})

    def finish(self) -> None:
        self.result.setdefault("status", "failed" if self.failures else "passed")
        if self.failures:
            self.result.setdefault("reason", f"{len(self.failures)} failures")
        self._write(self.result | {"failures": self.failures})
