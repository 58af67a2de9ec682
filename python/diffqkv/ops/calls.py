"""Calls of ops, whose errors become those that Python and torch have for a wrong argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import may_have_tangents
from .checks import ArgumentError, refused_kind, wrong

_OURS = re.compile(r"diffqkv: (\w+: got (.+), want .+)")
_FUNC = "an autograd.Function with functorch transforms"
_DISPATCHER = re.compile(r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'")


def _translated(op: Callable, error: RuntimeError, args: tuple, kwargs: dict[str, Any]) -> Exception | None:
    """The exception that a failed op call should have been; None if the error is not about an argument."""
    text, named = str(error), {}
    if _FUNC in text:
        return NotImplementedError(f"{op._opname}: torch.func.grad (vjp, jacrev) is not built; use torch.autograd.grad")
    if isinstance(op, torch._ops.OpOverload):
        named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
        for argument in op._schema.arguments:
            if str(argument.type) == "Tensor" and named[argument.name] is None:
                return wrong(argument.name, "NoneType", "a Tensor", TypeError)
    for name, x in named.items():
        if isinstance(x, Tensor) and (refused := refused_kind(name, x)):
            return refused
    if ours := _OURS.search(text):
        return (TypeError if ours[2].startswith("dtype ") else ArgumentError)(ours[1])
    if dispatcher := _DISPATCHER.search(text):
        want, name, got = dispatcher.groups()
        return wrong(name, got, f"a {want.removeprefix('Optional[').removesuffix(']')}", TypeError)
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    device = next((x.device for x in tensors.values()), None)
    for name, x in tensors.items():
        if x.device != device:
            return wrong(name, f"device {x.device}", f"{device}, where the other tensors are")
    return None


def call(op: Callable, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        translated = _translated(op, error, args, kwargs)
        if translated is None:
            raise
        raise translated from None


def _records_nothing(inputs: tuple[Any, ...]) -> bool:
    """Whether neither autograd nor a transform of torch.func has to know of a call with these inputs."""
    if torch._C._functorch.peek_interpreter_stack() is not None or may_have_tangents():
        return False
    return not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def call_differentiable(op: Callable, inputs: tuple[Any, ...], *args: Any) -> Any:
    """Calls an op that trains. inputs: those of its tensors that may require a gradient.

    Where none is recorded the call takes no way through the Python kernel of the op's gradient, which takes several
    microseconds.
    """
    if torch.compiler.is_compiling() or not _records_nothing(inputs):
        return call(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return call(op, *args)


def write(op: Callable, written: tuple[Tensor | None, ...], *args: Any, **kwargs: Any) -> None:
    """Calls an op that writes `written`, and counts their versions up, as `rules.autograd` does, but without a way
    through a Python kernel, which takes several microseconds.
    """
    if torch.compiler.is_compiling():
        op(*args, **kwargs)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        call(op, *args, **kwargs)
    torch.autograd.graph.increment_version([x for x in written if x is not None])
