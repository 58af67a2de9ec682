"""Which calls go to the compiled kernels; `composed` computes the others in plain torch."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from . import library
from .checks import DTYPES, TRAINING_DTYPES
from .options import PANELS, ROWS
from .rules.autocast import compute_dtype

# Ops whose CUDA kernel has passed benchmarks/device_check.py on a GPU. The others are opt-in.
CUDA_TESTED: frozenset[str] = frozenset()
CUDA_UNTESTED = os.environ.get("DIFFQKV_CUDA_UNTESTED") == "1"

OPS = (
    "flash_attention",
    "flash_attention_varlen",
    "decode_attention",
    "kv_cache_update",
    "selective_v_attention",
    "swiglu",
)
BACKWARD = {op: f"{op}_backward" for op in ("flash_attention", "flash_attention_varlen", "swiglu")}

# What the kernels take. Panels are the CPU's layout.
KERNEL_DTYPES = {op: TRAINING_DTYPES if op.startswith("flash_attention") else DTYPES for op in OPS}
_TAKES_PANELS = frozenset({"kv_cache_update"})
CUDA_CAPABILITY = (8, 0)  # at least


def _in_use() -> frozenset[str]:
    wanted = frozenset((*OPS, *BACKWARD.values())) if CUDA_UNTESTED else CUDA_TESTED
    return frozenset(op for op in wanted if library.has_kernel(op, "cuda"))


_IN_USE = _in_use()


def uses_kernel(op: str, x: Tensor, *inputs: Tensor | None, k_layout: int = ROWS) -> bool:
    """Whether a call of op on x goes to the compiled kernel. inputs: what else a gradient may be asked of."""
    device = x.device.type
    if device != "cuda":
        return library.loaded and device in ("cpu", "meta")  # meta: the fake kernels
    return (
        op in _IN_USE
        and compute_dtype(op, x) in KERNEL_DTYPES[op]
        and (k_layout != PANELS or op in _TAKES_PANELS)
        and (op not in BACKWARD or BACKWARD[op] in _IN_USE or not _records_graph(x, *inputs))
        # torch.compile cannot trace the question for the compute capability; the op itself then refuses an old GPU.
        and (torch.compiler.is_compiling() or _is_new_enough(x.device.index))
    )


def cuda_path(op: str) -> tuple[bool, str]:
    """Whether CUDA tensors can go to op's kernel at all, and why they do or do not."""
    if not library.has_kernel(op, "cuda"):
        return False, "no CUDA kernel in the library"
    if op not in _IN_USE:
        return False, "the CUDA kernel has never run on a GPU; DIFFQKV_CUDA_UNTESTED=1 uses it"
    if torch.cuda.is_available() and not _is_new_enough(torch.cuda.current_device()):
        got, want = (".".join(map(str, x)) for x in (torch.cuda.get_device_capability(), CUDA_CAPABILITY))
        return False, f"the GPU has compute capability {got}, the kernels need {want}"
    remarks = [] if op in CUDA_TESTED else ["never run on a GPU"]
    if op in BACKWARD and BACKWARD[op] not in _IN_USE:
        remarks.append("gradients in plain torch")
    return True, "; ".join(remarks)


def _records_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


@cache
def _is_new_enough(device: int) -> bool:
    # Without a GPU there are fake tensors at most.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= CUDA_CAPABILITY
