"""The normalisation of a model's layers."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch
from .arguments import as_number, refuse_gradients
from .calls import call
from .checks import DTYPES, Sizes, any_tensor, wrong
from .op import Op


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    checks.kind("x", x, x, DTYPES)
    if x.dim() == 0:
        raise wrong("x", "shape []", "[..., d]")
    checks.tensor("weight", weight, x, (x.dtype, torch.float32), Sizes(d=x.shape[-1]), "d")
    checks.contiguous("weight", weight)
    if not eps >= 0:
        raise wrong("eps", eps, "a number >= 0")


def _composed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_OP = dispatch.register(Op("rms_norm", check=_check, fake=_fake, composed=_composed))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, rounded as Llama does. For inference only.

    The quotient is computed in float32 and rounded to x's dtype, then multiplied by the weight and rounded again. A row
    does not depend on the others.

    Args:
        x: `[..., d]`, any strides; it is copied unless the elements of rows lie side by side and all rows are one
            stride apart.
        weight: `[d]`, contiguous, float32 or x's dtype.
        eps: a number >= 0.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode.
        NotImplementedError: forward-mode differentiation.
    """
    any_tensor("x", x)
    run = dispatch.uses_kernel(_OP, x)
    refuse_gradients("rms_norm", x=x, weight=weight)
    eps = as_number("eps", eps)
    if run:
        return call(_OP.kernel, x, weight, eps)
    return _OP.composed(x, weight, eps)
