"""What the package knows of an op in Python, as one object; and how options travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from . import library
from .autocast import with_cast_inputs
from .checks import DTYPES

Options = TypeVar("Options", bound=tuple)


def shared(options: NamedTuple, kind: type[Options]) -> Options:
    """The options that another kind has too, as that kind; the others have their defaults."""
    return kind(**{name: x for name, x in options._asdict().items() if name in kind._fields})


def checked(check: Callable, function: Callable) -> Callable:
    """function(*tensors, options), called by the op's schema: check looks at the arguments first.

    The names of the tensors, and the NamedTuple that collects the other arguments, are those of check. Keywords of
    function's own go through; `cache`, if it takes that, is what check returns.
    """
    leading = [name for name in signature(check).parameters if name != "options"]
    options_type = get_type_hints(check).get("options")
    own = [x.name for x in signature(function).parameters.values() if x.kind == x.KEYWORD_ONLY]

    @wraps(function)
    def kernel(*args: Any, **named: Any) -> Any:
        keywords = {name: named.pop(name) for name in own if name in named}
        given = [*args[: len(leading)], *(named.pop(name) for name in leading[len(args) :])]
        if options_type is not None:
            given.append(options_type(*args[len(leading) :], **named))
        result = check(*given)
        if "cache" in own:
            keywords["cache"] = result
        return function(*given, **keywords)

    return kernel


@dataclass(eq=False)
class Op:
    """An op: its parts are functions of the tensors and of one object with the options, as `checked` calls them.

    Attributes:
        name: that of the schema and of the public function.
        check: raises if an argument is wrong; the compiled op makes the same checks.
        fake: empty results, for fake and meta tensors.
        composed: the op in plain torch, called by the schema; None where torch differentiates plain torch itself.
        backward: the op that computes the gradients.
        gradient: setup_context and backward, as `torch.library.register_autograd` has them; together with `backward`.
        dtypes: what the kernels compute in.
        casts: under autocast the inputs are cast, as `scaled_dot_product_attention` casts its own.
        panels_on_cuda: the CUDA kernel takes a cache in panels, the CPU's layout.
        vmap: given the compiled op, the rule of `torch.library.register_vmap`.
        flops: the FLOPs, from the arguments by their names.
        kernel: the compiled op; there is none without the library.
        on_cuda: the CUDA kernel is there and may be used.
    """

    name: str
    _: KW_ONLY
    check: Callable[..., Any]
    fake: Callable[..., Any]
    composed: Callable[..., Any] | None = None
    backward: Op | None = None
    gradient: tuple[Callable, Callable] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    casts: bool = False
    panels_on_cuda: bool = False
    vmap: Callable[[Callable], Callable] | None = None
    flops: Callable[..., int] | None = None
    kernel: Callable = field(init=False)
    on_cuda: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.fake = checked(self.check, self.fake)
        if self.composed is not None:
            self.composed = checked(self.check, self.composed)
            if self.casts:
                self.composed = with_cast_inputs(self.composed)
        if (kernel := library.kernel(self.name)) is not None:
            self.kernel = kernel
