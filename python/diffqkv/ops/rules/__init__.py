"""What torch is told of the compiled ops: shapes, gradients, autocast, vmap and FLOPs."""

import torch

from ..op import Op
from . import autocast, autograd, flops, vmap


def register(op: Op) -> None:
    """Tells torch of a compiled op, and of the op of its gradients."""
    torch.library.register_fake(f"diffqkv::{op.name}")(op.fake)
    for rule in (autograd, autocast, vmap, flops):
        rule.register(op)
    if op.backward is not None:
        register(op.backward)
