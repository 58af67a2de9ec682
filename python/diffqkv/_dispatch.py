"""Kernels in Python for the compiled ops at functorch's, autocast's and autograd's keys of the dispatcher.

torch.library.register_autograd, register_vmap and register_autocast do this for ops without keyword-only tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

LIBRARY = torch.library.Library("diffqkv", "IMPL")


class Op(NamedTuple):
    """An op whose arguments, keyword-only ones included, are one sequence of values in the order of its schema."""

    overload: torch._ops.OpOverload
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.overload._opname

    def values(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Of what a kernel gets, with the defaults that the dispatcher left out."""
        arguments = self.overload._schema.arguments
        named = dict(zip(self.names, args, strict=False)) | kwargs
        return [named.get(argument.name, argument.default_value) for argument in arguments]

    def split(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """args and kwargs of a call."""
        arguments = list(zip(self.overload._schema.arguments, values, strict=True))
        return [x for a, x in arguments if not a.kwarg_only], {a.name: x for a, x in arguments if a.kwarg_only}

    def __call__(self, *values: Any) -> Any:
        args, kwargs = self.split(values)
        return self.overload(*args, **kwargs)


def op(name: str) -> Op:
    overload = getattr(torch.ops.diffqkv, name).default
    return Op(overload, tuple(argument.name for argument in overload._schema.arguments))


def register(op: Op, key: str, kernel: Callable) -> None:
    """kernel(keyset, *args, **kwargs) runs at a dispatch key."""
    LIBRARY.impl(op.name, kernel, key, with_keyset=True)
