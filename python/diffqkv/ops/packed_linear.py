"""Linear layers whose weights lie as they are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import quantization
from . import checks, dispatch
from .arguments import as_integer, refuse_gradients
from .autocast import outside_autocast
from .calls import call
from .checks import DTYPES, Sizes, any_tensor, dtype_name, wrong
from .op import Op

_SHAPES = {
    torch.float32: "panels in_features 32",
    torch.float16: "panels in_features 32",
    torch.bfloat16: "panels in_features/2 32 2",
    torch.int8: "panels in_features/2 32 2",
    torch.uint8: "panels in_features/8 32 4",
}
_INTEGERS = (torch.int8, torch.uint8)


def _check(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, out_features: int
) -> None:
    checks.kind("x", x, x, DTYPES)
    if x.dim() == 0:
        raise wrong("x", "shape []", "[..., in_features]")
    if out_features < 1:
        raise wrong("out_features", out_features, "an integer >= 1")
    checks.kind("weight", weight, x, (x.dtype, *_INTEGERS))
    k, is_integer, kind = x.shape[-1], weight.dtype in _INTEGERS, f"weights of {dtype_name(weight.dtype)}"
    divisor = quantization.GROUP_SIZES.start if is_integer else 2 if weight.dtype == torch.bfloat16 else 1
    if k < divisor or k % divisor:
        raise wrong("x", f"{k} input features", f"a multiple of {divisor} for {kind}")
    panels = -(-out_features // quantization.PANEL)
    sizes = Sizes({"in_features": k, "in_features/2": k // 2, "in_features/8": k // 8, "panels": panels})
    sizes["out_features"] = out_features
    checks.tensor("weight", weight, x, (weight.dtype,), sizes, _SHAPES[weight.dtype])
    checks.contiguous("weight", weight)
    if (scales is not None) != is_integer:
        got, want = ("None", "a Tensor") if is_integer else ("a Tensor", "None")
        raise wrong("scales", got, f"{want} for {kind}")
    if zeros is not None and not is_integer:
        raise wrong("zeros", "a Tensor", f"None for {kind}")
    if scales is not None:
        checks.tensor("scales", scales, x, DTYPES, sizes, "panels groups 32")
        checks.contiguous("scales", scales)
        groups, largest = sizes["groups"], quantization.GROUP_SIZES[-1]
        # torch.compile cannot trace `in` of a range where sizes are dynamic.
        if groups < 1 or k % groups or k // groups % divisor or k // groups > largest:
            raise wrong("scales", f"{groups} groups of {k} input features", "groups of a multiple of 32 up to 256")
        if zeros is not None:
            checks.tensor("zeros", zeros, x, (scales.dtype,), sizes, "panels groups 32")
            checks.contiguous("zeros", zeros)
    if bias is not None:
        checks.tensor("bias", bias, x, (x.dtype,), sizes, "out_features")
        checks.contiguous("bias", bias)


@outside_autocast
def _composed(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    if scales is None:
        return F.linear(x, quantization.unpack(weight, out_features), bias)
    return F.linear(x, quantization.dequantize(weight, out_features, scales, zeros, x.dtype), bias)


def _fake(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _flops(x: Tensor, out_features: int, **rest) -> int:
    return 2 * x.numel() * out_features


_OP = dispatch.register(Op("packed_linear", check=_check, fake=_fake, composed=_composed, flops=_flops))


def packed_linear(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias, with W in panels: read once at the speed of memory by few rows of x. For inference only.

    `diffqkv.quantization` makes the panels, and describes them.

    Floating-point weights: products of float32, or of bfloat16 where the CPU has a dot product of them, are added up in
    float32. Integer weights: each group of x is rounded to 16-bit integers, by at most 1.6e-5 of its largest |x| (or of
    1e-30); their products with the weights are exact, and groups are added up in float32. A group with an infinity or
    NaN makes the whole row NaN. A result does not depend on the other rows. Plain torch rounds the weights that
    integers stand for to x's dtype instead, and x not at all.

    Args:
        x: `[..., in_features]`, any strides.
        weight: contiguous; in x's dtype `[ceil(out_features / 32), in_features, 32]`, bfloat16
            `[.., in_features / 2, 32, 2]`; or integers of int8 `[.., in_features / 2, 32, 2]`, of 4 bits, as uint8,
            `[.., in_features / 8, 32, 4]`. in_features is even for bfloat16, a multiple of 32 for integers.
        scales: for integers, `[ceil(out_features / 32), groups, 32]`, float32, bfloat16 or float16: a weight is scale *
            integer + zero. The groups have in_features / groups input features: a multiple of 32 up to 256.
        zeros: as scales, in their dtype; 0 by default.
        bias: `[out_features]` in x's dtype.

    Returns:
        `[..., out_features]` in x's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode.
        NotImplementedError: forward-mode differentiation.
    """
    any_tensor("x", x)
    run = dispatch.uses_kernel(_OP, x)
    refuse_gradients("packed_linear", x=x, weight=weight, scales=scales, zeros=zeros, bias=bias)
    out_features = as_integer("out_features", out_features, 1)
    if run:
        return call(_OP.kernel, x, weight, scales, zeros, bias, out_features)
    return _OP.composed(x, weight, scales, zeros, bias, out_features)
