"""The activation of augmented Q and of the FFN."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch
from .calls import call_differentiable
from .checks import DTYPES, any_tensor, wrong
from .op import Op


def _check_alike(gate: Tensor, **others: Tensor) -> None:
    checks.kind("gate", gate, gate, DTYPES)
    for name, x in others.items():
        checks.kind(name, x, gate, (gate.dtype,))
        if x.shape != gate.shape:
            raise wrong(name, f"shape {list(x.shape)}", f"the shape of gate = {list(gate.shape)}")


def _check(gate: Tensor, up: Tensor) -> None:
    _check_alike(gate=gate, up=up)


def _check_backward(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    _check_alike(gate=gate, up=up, dout=dout)


def _composed(gate: Tensor, up: Tensor) -> Tensor:
    """The op, differentiable through torch's own autograd."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype).contiguous()


def _composed_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The op: the gradients of gate and up."""
    g, u, d = gate.float(), up.float(), dout.float()
    sigmoid = torch.sigmoid(g)
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype), (d * (g * sigmoid)).to(gate.dtype)


def _fake(gate: Tensor, up: Tensor):
    return gate.new_empty(gate.shape)


def _fake_backward(dout: Tensor, gate: Tensor, up: Tensor):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _BACKWARD.kernel(dout, *ctx.saved_tensors)


_BACKWARD = Op("swiglu_backward", check=_check_backward, fake=_fake_backward, composed=_composed_backward)
_OP = dispatch.register(
    Op(
        "swiglu",
        check=_check,
        fake=_fake,
        composed=_composed,
        backward=_BACKWARD,
        gradient=(_setup_context, _gradient),
    )
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one pass, computed in float32: the activation of augmented Q (appendix E) and of the FFN.

    Args:
        gate, up: equal shapes and dtypes (float32, bfloat16, float16).

    Returns:
        A tensor of that shape and dtype; differentiable once.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    any_tensor("gate", gate)
    if dispatch.uses_kernel(_OP, gate, up):
        return call_differentiable(_OP.kernel, (gate, up), gate, up)
    return _OP.composed(gate, up)
