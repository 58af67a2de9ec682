"""Argument checks of the plain-torch paths and the fake kernels; the compiled ops make the same ones in C++.

A violation is a TypeError (not a tensor, wrong dtype) or an ArgumentError, `argument: got ..., want ...`, before
anything is written. Values of tensors are looked at on the CPU only: elsewhere that would synchronise.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINING_DTYPES = (*DTYPES, torch.float64)
_DEBUG = os.environ.get("DIFFQKV_DEBUG") == "1"


class ArgumentError(ValueError, RuntimeError):
    """A wrong value or shape: Python's name for it is ValueError, torch and FlashAttention raise RuntimeError."""


def wrong(name: str, got: object, want: str, error: type[Exception] = ArgumentError) -> Exception:
    return error(f"{name}: got {got}, want {want}")


def gcd(a: int, b: int) -> int:
    """math.gcd, which torch.compile cannot trace where sizes are dynamic."""
    while b != 0:
        a, b = b, a % b
    return a


def readable(x: Tensor) -> bool:
    """Whether the values of x may be looked at here."""
    return (
        (x.device.type == "cpu" or (_DEBUG and x.device.type == "cuda"))
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
    )


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Sizes(dict[str, int]):
    """The sizes that a call's shapes have in common, by name."""

    def check(self, name: str, x: Tensor, layout: str) -> None:
        """Checks x against a layout like "b n_q s_q d_k": known sizes and numbers must agree, others become known."""
        sizes = layout.split()
        wanted = [int(size) if size.isdecimal() else self.get(size) for size in sizes]
        if x.dim() != len(sizes) or any(n is not None and n != m for n, m in zip(wanted, x.shape, strict=True)):
            want = (size if n is None or size.isdecimal() else f"{size} = {n}" for size, n in zip(sizes, wanted))  # noqa: B905
            raise wrong(name, f"shape {list(x.shape)}", f"[{', '.join(want)}]")
        self.update(zip(sizes, x.shape, strict=True))


def refused_kind(name: str, x: Tensor) -> Exception | None:
    """The exception for a tensor whose elements do not lie in memory by strides."""
    if x.is_nested:
        refused = "nested"
    elif x.is_quantized:
        refused = "quantized"
    elif x.layout != torch.strided:
        refused = str(x.layout).removeprefix("torch.").lstrip("_")  # sparse_coo, sparse_csr, mkldnn
    else:
        return None
    return wrong(name, f"a {refused} tensor", "a dense (strided) tensor", TypeError)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def any_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a Tensor", TypeError)


def kind(name: str, x: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks all of x but its shape and strides; `like` is a tensor on the device that it must be on."""
    any_tensor(name, x)
    if refused := refused_kind(name, x):
        raise refused
    if x.dtype not in dtypes:
        want = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        raise wrong(name, f"dtype {dtype_name(x.dtype)}", want, TypeError)
    if x.device != like.device:
        raise wrong(name, f"device {x.device}", f"{like.device}, where the other tensors are")


def tensor(name: str, x: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], sizes: Sizes, layout: str) -> None:
    """Checks all of x but its strides."""
    kind(name, x, like, dtypes)
    sizes.check(name, x, layout)


def unit_last_stride(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise wrong(name, f"stride {x.stride(-1)} in the last dimension", "1")


def rows(name: str, x: Tensor, like: Tensor, sizes: Sizes, layout: str, dtypes: tuple = DTYPES) -> None:
    """Checks a tensor of q, k or v; `like` is the first of its call, whose dtype is one of dtypes."""
    tensor(name, x, like, dtypes if x is like else (like.dtype,), sizes, layout)
    unit_last_stride(name, x)


def contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        if x.dim() == 1:
            raise wrong(name, f"stride {x.stride(0)}", "1")
        raise wrong(name, f"strides {list(x.stride())}", "a contiguous tensor")


def head_dim(name: str, d: int) -> None:
    if d % 8 != 0 or d < 8 or d > 256:
        raise wrong(name, f"head dimension {d}", "a multiple of 8 from 8 to 256")


def heads(name: str, n: int, n_q: int) -> None:
    if n < 1 or n_q % n != 0:
        raise wrong(name, f"{n} heads", f"a divisor of q's {n_q} heads")


def values(name: str, x: Tensor, low: int | Tensor, high: int | Tensor, want: str) -> None:
    if not readable(x):
        return
    bad = (x < low) | (x > high)
    if bad.any():
        raise wrong(name, int(x[bad][0]), want)


def per_entry(name: str, x: Tensor, like: Tensor, sizes: Sizes) -> None:
    tensor(name, x, like, (torch.int32,), sizes, "b")
    contiguous(name, x)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _has_memory(x: Tensor) -> bool:
    """Whether x is a plain tensor: not fake, functional or mapped."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" and not wrapped


def memory(written: dict[str, Tensor | None], read: dict[str, Tensor]) -> None:
    """Checks that every element of what is written has a place of its own; interleaved tensors are believed."""
    if torch.compiler.is_compiling():
        return
    tensors = [(name, x) for name, x in (written | read).items() if x is not None and x.numel() > 0]
    if not all(_has_memory(x) for _, x in tensors):
        return
    extents = []
    for name, x in tensors:
        reach, apart = 0, True
        for stride, size in sorted((x.stride(i), n) for i, n in enumerate(x.shape) if n > 1):
            apart = apart and stride > reach
            reach += (size - 1) * stride
        if name in written and not apart:
            raise wrong(name, "elements that share memory", "one place for each: it is written")
        extents.append((range(x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()), reach + 1 == x.numel()))
    for i, ((name, _), (here, filled)) in enumerate(zip(tensors, extents, strict=True)):
        if name not in written:
            break
        for (other, _), (there, also_filled) in zip(tensors[i + 1 :], extents[i + 1 :], strict=True):
            meet = here[0] == there[0]
            meet = meet or (filled and (there[0] in here or there[-1] in here))
            if meet or (also_filled and (here[0] in there or here[-1] in there)):
                raise wrong(other, f"memory of {name}", f"its own: {name} is written")
