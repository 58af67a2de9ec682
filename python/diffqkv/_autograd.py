"""Gradients of the compiled ops. Only swiglu has them: decode, cache and selection are for inference."""

from __future__ import annotations

import torch
from torch import Tensor


def _save_inputs(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.diffqkv.swiglu_backward.default(dout, *ctx.saved_tensors)


torch.library.register_autograd("diffqkv::swiglu", _swiglu_backward, setup_context=_save_inputs)
