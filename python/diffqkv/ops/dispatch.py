"""The ops that there are, and which calls of them go to the compiled kernels; plain torch computes the others."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from . import library
from .autocast import cast_dtype
from .caches import PANELS, ROWS
from .op import Op

# Ops whose CUDA kernel has passed benchmarks/device_check.py on a GPU. The others are opt-in.
CUDA_TESTED: frozenset[str] = frozenset()
CUDA_UNTESTED = os.environ.get("DIFFQKV_CUDA_UNTESTED") == "1"
CUDA_CAPABILITY = (8, 0)  # at least

OPS: dict[str, Op] = {}  # those with a public function
BACKWARD: dict[str, str] = {}  # by the names of the ops that train, those of their gradients


def register(op: Op) -> Op:
    """Adds op, and the op of its gradients, to those that there are."""
    OPS[op.name] = op
    op.on_cuda = may_use_cuda(op.name)
    if op.backward is not None:
        BACKWARD[op.name] = op.backward.name
        op.backward.on_cuda = may_use_cuda(op.backward.name)
    return op


def may_use_cuda(op: str) -> bool:
    return (CUDA_UNTESTED or op in CUDA_TESTED) and library.has_kernel(op, "cuda")


def uses_kernel(op: Op, x: Tensor, *inputs: Tensor | None, k_layout: int = ROWS) -> bool:
    """Whether a call of op on x goes to the compiled kernel. inputs: what else a gradient may be asked of."""
    device = x.device.type
    if device != "cuda":
        return library.loaded and device in ("cpu", "meta")  # meta: the fake kernels
    return (
        library.loaded
        and op.on_cuda
        and (cast_dtype(x) if op.casts else x.dtype) in op.dtypes
        and (k_layout != PANELS or op.panels_on_cuda)
        and (op.backward is None or op.backward.on_cuda or not _records_graph(x, *inputs))
        # torch.compile cannot trace the question for the compute capability; the op itself then refuses an old GPU.
        and (torch.compiler.is_compiling() or _is_new_enough(x.device.index))
    )


def cuda_path(op: Op) -> tuple[bool, str]:
    """Whether CUDA tensors can go to op's kernel at all, and why they do or do not."""
    if not library.has_kernel(op.name, "cuda"):
        return False, "no CUDA kernel in the library"
    if not op.on_cuda:
        return False, "the CUDA kernel has never run on a GPU; DIFFQKV_CUDA_UNTESTED=1 uses it"
    if torch.cuda.is_available() and not _is_new_enough(torch.cuda.current_device()):
        got, want = (".".join(map(str, x)) for x in (torch.cuda.get_device_capability(), CUDA_CAPABILITY))
        return False, f"the GPU has compute capability {got}, the kernels need {want}"
    remarks = [] if op.name in CUDA_TESTED else ["never run on a GPU"]
    if op.backward is not None and not op.backward.on_cuda:
        remarks.append("gradients in plain torch")
    return True, "; ".join(remarks)


def _records_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


@cache
def _is_new_enough(device: int) -> bool:
    # Without a GPU there are fake tensors at most.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= CUDA_CAPABILITY
