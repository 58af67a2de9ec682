"""Autograd of the compiled ops: gradients of those that train, versions of what others write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionOptions
from ..op import Op

_LIBRARY = torch.library.Library("diffqkv", "IMPL")
_SINKS = AttentionOptions._fields.index("sinks") - len(AttentionOptions._fields)  # counted from the end of a call


def of_attention(differentiate: Op) -> tuple[Callable, Callable]:
    """setup_context and backward of a training attention, whose gradients the op `differentiate` computes."""

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors  # once: activation checkpointing computes them here
        q, k, v, *rest = (c if x is None else x for x, c in zip(tensors, ctx.constants, strict=True))
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, dsinks = differentiate.kernel(dout, dlse, q, k, v, out, lse, *rest)
        gradients: list[Tensor | None] = [dq, dk, dv] + [None] * len(rest)
        gradients[_SINKS] = None if rest[_SINKS] is None else dsinks
        return tuple(gradients)

    return setup_context, backward


def _refuse_second(op: Op) -> None:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{op.name}: the gradient of a gradient is not built")

    torch.library.register_autograd(f"diffqkv::{op.name}", refuse)


def _register_writes(op: torch._ops.OpOverload) -> None:
    """Counts a version up for every tensor that op writes, so that a graph that saved one raises.

    Torch's own in-place ops do so at this dispatch key; ops of its stable ABI have nothing there.
    """
    written = [(i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write]

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **named: Any) -> Any:
        result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **named)
        tensors = (args[i] if i < len(args) else named.get(name) for i, name in written)
        torch.autograd.graph.increment_version([x for x in tensors if x is not None])
        return result

    _LIBRARY.impl(op, kernel, "ADInplaceOrView", with_keyset=True)


def register(op: Op) -> None:
    if op.gradient is not None:
        setup_context, backward = op.gradient
        torch.library.register_autograd(f"diffqkv::{op.name}", backward, setup_context=setup_context)
    if op.backward is not None:
        _refuse_second(op.backward)
    if op.kernel._schema.is_mutable:
        _register_writes(op.kernel)
