"""Gradients of the compiled ops: the training attention and swiglu. Decode, cache and selection are for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _dispatch
from ._dispatch import Op

# backward(inputs, outputs, gradients of the outputs, None where there is none) -> gradients by the inputs' names
Backward = Callable[[dict[str, Any], Sequence[Tensor], Sequence[Tensor | None]], dict[str, Tensor]]


def _differentiable(op: Op, backward: Backward) -> None:
    """Also under torch.func: a Function of a single level is what the transforms of torch.func call level by level."""

    def below(keyset: torch._C.DispatchKeySet, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *values):
            result = below(keyset, *op.split(values))
            outputs = result if isinstance(result, tuple) else (result,)
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values), *outputs)
            ctx.constants = [None if isinstance(x, Tensor) else x for x in values]
            ctx.set_materialize_grads(False)
            return result

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * (1 + len(op.names))
            saved = ctx.saved_tensors  # once: activation checkpointing computes them here
            tensors, outputs = saved[: len(op.names)], saved[len(op.names) :]
            values = (c if t is None else t for c, t in zip(ctx.constants, tensors, strict=True))
            found = backward(dict(zip(op.names, values, strict=True)), outputs, grads)
            return None, *(found.get(name) for name in op.names)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(f"{op.name}: forward-mode differentiation is not built")

    Function.__name__ = f"{op.name}_autograd"

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*args, *kwargs.values())
        if not tracked and forward_ad._current_level < 0:
            return below(keyset, args, kwargs)
        with enable_single_level_autograd_function():
            return Function.apply(keyset, *op.values(args, kwargs))

    _dispatch.register(op, "Autograd", kernel)


def _once(op: Op) -> Backward:
    def refuse(*_: Any) -> dict[str, Tensor]:
        raise NotImplementedError(f"{op.name}: the gradient of a gradient is not built")

    return refuse


def _attention_backward(op: Op) -> Backward:
    """op: flash_attention_backward or flash_attention_varlen_backward."""

    def backward(inputs, outputs, grads):
        (out, lse), (dout, dlse) = outputs, grads
        dout = torch.zeros_like(out) if dout is None else dout
        known = inputs | {"dout": dout, "dlse": dlse, "out": out, "lse": lse}
        gradients = dict(zip(("q", "k", "v", "sinks"), op(*(known[name] for name in op.names)), strict=True))
        if inputs["sinks"] is None:
            del gradients["sinks"]
        return gradients

    return backward


def _swiglu_backward(op: Op) -> Backward:
    def backward(inputs, outputs, grads):
        return dict(zip(("gate", "up"), op(grads[0], inputs["gate"], inputs["up"]), strict=True))

    return backward


for _name, _formula in (
    ("flash_attention", _attention_backward),
    ("flash_attention_varlen", _attention_backward),
    ("swiglu", _swiglu_backward),
):
    _backward_op = _dispatch.op(f"{_name}_backward")
    _differentiable(_dispatch.op(_name), _formula(_backward_op))
    _differentiable(_backward_op, _once(_backward_op))
