"""Autograd of the compiled ops: gradients of the training attention and swiglu, versions of what others write.

Decode, cache and selection are for inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import BACKWARD, OPS

_LIBRARY = torch.library.Library("diffqkv", "IMPL")


def _register_attention(name: str) -> None:
    differentiate = getattr(torch.ops.diffqkv, f"{name}_backward").default
    names = [argument.name for argument in getattr(torch.ops.diffqkv, name).default._schema.arguments]
    sinks_at = names.index("sinks")

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors  # once: activation checkpointing computes them here
        q, k, v, *rest = (c if x is None else x for x, c in zip(tensors, ctx.constants, strict=True))
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, dsinks = differentiate(dout, dlse, q, k, v, out, lse, *rest)
        gradients: list[Tensor | None] = [dq, dk, dv] + [None] * len(rest)
        gradients[sinks_at] = None if rest[sinks_at - 3] is None else dsinks
        return tuple(gradients)

    torch.library.register_autograd(f"diffqkv::{name}", backward, setup_context=setup_context)


def _swiglu_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.diffqkv.swiglu_backward.default(dout, *ctx.saved_tensors)


def _refuse_second(name: str) -> None:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name}: the gradient of a gradient is not built")

    torch.library.register_autograd(f"diffqkv::{name}", refuse)


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


_register_attention("flash_attention")
_register_attention("flash_attention_varlen")
torch.library.register_autograd("diffqkv::swiglu", _swiglu_backward, setup_context=_swiglu_setup)
for _name in BACKWARD.values():
    _refuse_second(_name)
for _name in (*OPS, *BACKWARD.values()):
    if (_op := getattr(torch.ops.diffqkv, _name).default)._schema.is_mutable:
        _register_writes(_op)
