"""The rotation of Q, and the angles of K's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import checks, dispatch
from .arguments import refuse_gradients
from .calls import call
from .checks import Sizes, any_tensor, wrong
from .op import Op


def check_rope(like: Tensor, cos: Tensor, sin: Tensor, batch: int, tokens: int, d: int) -> None:
    """Checks cos and sin `[batch or 1, tokens, d_rot]` of rows like those of `like`, which have d elements."""
    for name, x in (("cos", cos), ("sin", sin)):
        checks.kind(name, x, like, (torch.float32, like.dtype))
        fits = x.dim() == 3 and x.shape[0] in (1, batch) and x.shape[1] == tokens
        if not fits or x.shape[2] % 2 != 0 or x.shape[2] > d:
            raise wrong(name, f"shape {list(x.shape)}", f"[{batch} or 1, {tokens}, an even number <= {d}]")
        checks.unit_last_stride(name, x)
    if sin.dtype != cos.dtype:
        raise wrong(
            "sin", f"dtype {checks.dtype_name(sin.dtype)}", f"{checks.dtype_name(cos.dtype)}, that of cos", TypeError
        )
    if sin.shape != cos.shape:
        raise wrong("sin", f"shape {list(sin.shape)}", f"the shape of cos = {list(cos.shape)}")
    if sin.stride() != cos.stride():
        raise wrong("sin", f"strides {list(sin.stride())}", f"{list(cos.stride())}, those of cos")


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    sizes = Sizes()
    checks.rows("x", x, x, sizes, "b t heads d")
    check_rope(x, cos, sin, sizes["b"], sizes["t"], sizes["d"])


def _composed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2).to(x.dtype).contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_OP = dispatch.register(Op("rotary_embedding", check=_check, fake=_fake, composed=_composed))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x, in float32 and rounded once: the arithmetic of `kv_cache_update`, for Q. For inference only.

    Args:
        x: `[b, t, heads, d]`.
        cos, sin: `[b or 1, t, d_rot]`, float32 or x's dtype, d_rot even and at most d: rotate the first d_rot
            dimensions of x, dimension c with c + d_rot / 2 (the half-split convention). The others pass through.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode.
        NotImplementedError: forward-mode differentiation.
    """
    any_tensor("x", x)
    run = dispatch.uses_kernel(_OP, x)
    refuse_gradients("rotary_embedding", x=x, cos=cos, sin=sin)
    if run:
        return call(_OP.kernel, x, cos, sin)
    return _OP.composed(x, cos, sin)
