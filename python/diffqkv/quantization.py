"""Weights of linear layers as `diffqkv.packed_linear` takes them: in panels, and as integers of 8 or 4 bits.

A panel holds 32 output features side by side, so that a product needs no horizontal sum; of the last one, what is left
over is zero. `weight` is `[n, k]` as in `torch.nn.Linear`: n output features of k input features.

| dtype | form | holds |
|---|---|---|
| float32, float16 | `[ceil(n / 32), k, 32]` | the weights |
| bfloat16 | `[ceil(n / 32), k / 2, 32, 2]` | the weights, two neighbouring input features together |
| int8 | `[ceil(n / 32), k / 2, 32, 2]` | integers of 8 bits |
| uint8 | `[ceil(n / 32), k / 8, 32, 4]` | integers of 4 bits plus 8; bits 4 j of 16-bit half h: input feature 2 j + h |

Integers stand for scale * integer + zero, with a scale and a zero for each output feature and group of neighbouring
input features: `[ceil(n / 32), k / group_size, 32]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from . import memory
from .ops.checks import any_tensor, dtype_name, kind, wrong

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 32  # output features
GROUP_SIZES = range(32, 257, 32)
_BLOCK = 1 << 18  # weights that are quantised at a time, within the cache of a core, in some 20 bytes each
# Scales that are tried, as parts of the one by which the largest weight of a group is the least integer. A larger one
# rounds the weights of the other sign less, whose largest integer is nearer to zero.
_SHARES = {8: (1.0,), 4: (1.0, 1.04, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)}


def pack(weight: Tensor) -> Tensor:
    """Weights `[n, k]` of float32, float16 or bfloat16, or integers of int8, in panels.

    Raises:
        ValueError, TypeError: another shape or dtype; an odd k, where two input features lie together.
    """
    _check_matrix("weight", weight, (*FLOATS, torch.int8))
    pairs = 2 if weight.dtype in (torch.bfloat16, torch.int8) else 1
    _check_steps("weight", weight, pairs)
    by_panel = _whole_panels(weight).unflatten(0, (-1, PANEL)).unflatten(-1, (-1, pairs)).transpose(1, 2)
    return memory.contiguous(by_panel if pairs == 2 else by_panel.squeeze(-1))


def in_features(packed: Tensor) -> int:
    """The k of weights in panels."""
    return packed.shape[1] * (8 if packed.dtype == torch.uint8 else 2 if packed.dim() == 4 else 1)


def unpack(packed: Tensor, out_features: int) -> Tensor:
    """The weights, or the integers as int8, `[out_features, k]`."""
    if packed.dtype == torch.uint8:
        halves = packed.contiguous().view(torch.int16)[..., None]  # [panels, steps, 32, 2, 1]
        nibbles = (halves >> torch.arange(0, 16, 4, dtype=torch.int16, device=packed.device)) & 15
        by_step = (nibbles - 8).to(torch.int8).transpose(-1, -2).flatten(3)
    else:
        by_step = packed if packed.dim() == 4 else packed[..., None]
    return by_step.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]


def pack_int4(integers: Tensor) -> Tensor:
    """Integers `[n, k]` of int8, from -8 to 7, in panels of 4 bits each.

    Raises:
        ValueError, TypeError: another shape or dtype, or an integer of more than 4 bits.
    """
    _check_matrix("integers", integers, (torch.int8,))
    _check_steps("integers", integers, 8)
    if _has_values(integers) and (wide := (integers < -8) | (integers > 7)).any():
        raise wrong("integers", int(integers[wide][0]), "an integer from -8 to 7")
    nibbles = (integers + 8).view(torch.uint8).unflatten(-1, (-1, 2, 2, 2))  # [n, steps, byte, nibble, half]
    halves = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).transpose(-1, -2).flatten(2)  # [n, steps, 4]
    return memory.contiguous(_whole_panels(halves, 0x88).unflatten(0, (-1, PANEL)).transpose(1, 2))


def pack_groups(numbers: Tensor) -> Tensor:
    """Scales or zeros `[n, groups]` in panels."""
    return _whole_panels(numbers).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, out_features: int) -> Tensor:
    """Scales or zeros `[out_features, groups]`."""
    return packed.transpose(1, 2).flatten(0, 1)[:out_features]


def _whole_panels(x: Tensor, value: int = 0) -> Tensor:
    missing = -x.shape[0] % PANEL
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing), value=value) if missing else x


def dequantize(packed: Tensor, out_features: int, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights `[out_features, k]` that integers stand for; computed in float32."""
    integers = unpack(packed, out_features).float()
    by_group = integers.unflatten(-1, (scales.shape[1], -1)) * unpack_groups(scales, out_features).float()[..., None]
    if zeros is not None:
        by_group = by_group + unpack_groups(zeros, out_features).float()[..., None]
    return by_group.flatten(1).to(dtype)


def quantize(weight: Tensor, bits: int, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Rounds weights `[n, k]` to integers of `bits` (8 or 4), with a scale for each group of input features.

    A group's scale is |largest weight| / 2^(bits - 1), or of 4 bits the one of some around it by which the integers are
    nearest to the weights, in the mean square.

    Returns:
        integers `[n, k]`, int8, and scales `[n, k / group_size]`, bfloat16: 8.5 or 4.5 bits a weight by groups of 32.

    Raises:
        ValueError, TypeError: another shape or dtype, another number of bits, a k or group_size that does not fit, or a
            weight that is no number or infinite.
    """
    _check_matrix("weight", weight, (*FLOATS, torch.float64))
    if bits not in (4, 8):
        raise wrong("bits", bits, "8 or 4")
    check_group_size(group_size, weight.shape[1])
    parts = weight.detach().split(max(1, _BLOCK // weight.shape[1]))
    if _has_values(weight):
        for part in parts:
            _check_finite(part.float())
    integers, scales = (torch.cat(x) for x in zip(*(_quantize_rows(x, bits, group_size) for x in parts), strict=True))
    return integers, scales


def quantize_to_panels(weight: Tensor, bits: int, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """The integers and scales of `quantize` in panels, made of a few panels at a time to need little memory besides."""
    (n, k), panels_of = weight.shape, pack if bits == 8 else pack_int4
    panels, steps = -(-n // PANEL), (k // 2, PANEL, 2) if bits == 8 else (k // 8, PANEL, 4)
    packed = memory.empty((panels, *steps), torch.int8 if bits == 8 else torch.uint8, weight.device)
    scales = torch.empty(panels, k // group_size, PANEL, dtype=torch.bfloat16, device=weight.device)
    some = max(1, _BLOCK // (k * PANEL))
    for rows, *to in zip(weight.split(some * PANEL), packed.split(some), scales.split(some), strict=True):
        integers, their_scales = quantize(rows, bits, group_size)
        to[0].copy_(panels_of(integers))
        to[1].copy_(pack_groups(their_scales))
    return packed, scales


def check_group_size(group_size: int, in_features: int) -> None:
    """Raises ValueError unless groups of this size can divide so many input features."""
    if group_size not in GROUP_SIZES:
        raise wrong("group_size", group_size, "a multiple of 32 up to 256")
    if in_features < 1 or in_features % group_size:
        raise wrong("group_size", group_size, f"a divisor of the {in_features} input features")


def _has_values(x: Tensor) -> bool:
    """Whether the values of x can be looked at: a layer may be made on the meta device first."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def _check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    any_tensor(name, x)
    kind(name, x, x, dtypes)
    if x.dim() != 2:
        raise wrong(name, f"shape {list(x.shape)}", "[out_features, in_features]")


def _check_steps(name: str, x: Tensor, divisor: int) -> None:
    if x.shape[1] % divisor:
        raise wrong(
            name, f"{x.shape[1]} input features", f"a multiple of {divisor} for panels of {dtype_name(x.dtype)}"
        )


def _check_finite(weight: Tensor) -> None:
    if not (finite := weight.isfinite()).all():
        raise wrong("weight", f"{float(weight[~finite][0])}", "finite numbers")


def _quantize_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # [group_size, groups]: what a group has in common is one row, and its sums run over rows.
    groups = weight.float().reshape(n * k // group_size, group_size).T.contiguous()
    low, high = groups.amin(0), groups.amax(0)
    # The largest weight becomes the least integer, of which there is one more than on the other side.
    fitting = torch.where(-low >= high, low, high) / least
    unit = torch.where(fitting == 0, 1, fitting)
    groups /= unit  # squares of integers' size neither vanish nor overflow, however small or large the weights are
    integers, best, error = torch.empty_like(groups), fitting.to(torch.bfloat16), None
    for share in _SHARES[bits]:
        scales = (fitting * share).to(torch.bfloat16)
        steps = scales.float() / unit
        _round(groups, steps, least, most, integers)
        now = integers.mul_(steps).sub_(groups).square_().sum(0)
        best = scales if error is None else torch.where(now < error, scales, best)
        error = now if error is None else torch.minimum(now, error)
    _round(groups, best.float() / unit, least, most, integers)
    return integers.to(torch.int8).T.reshape(n, k), best.view(n, k // group_size)


def _round(groups: Tensor, steps: Tensor, least: int, most: int, out: Tensor) -> None:
    """Writes into out the integers by which steps are nearest to groups; zero where a step is."""
    torch.mul(groups, torch.where(steps == 0, 0, 1 / steps), out=out).round_().clamp_(least, most)
