"""torch.vmap over the training attention: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from . import _dispatch
from ._checks import wrong
from ._dispatch import Op


def _fold(x: Any, dim: int | None, size: int) -> Any:
    """`[size, b, ...]` -> `[size * b, ...]`; what is not mapped is the same for all."""
    if not isinstance(x, Tensor):
        return x
    x = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _batch(op: Op, size: int, in_dims: Sequence[int | None], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results, with the mapped dimension first."""
    inputs, dims = dict(zip(op.names, values, strict=True)), dict(zip(op.names, in_dims, strict=True))
    if dims["sinks"] is not None:
        raise wrong("sinks", "a mapped dimension", f"none: under torch.vmap all of {op.name} has the same sinks")
    if inputs["dropout_p"] != 0:
        raise wrong("dropout_p", inputs["dropout_p"], f"0 under torch.vmap: a seed is one mask for all of {op.name}")
    folded = {name: x if name == "sinks" else _fold(x, dims[name], size) for name, x in inputs.items()}
    if inputs["sinks"] is None or "dout" not in inputs:
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in op(*folded.values()))
    # The gradient of the sinks is a sum over a batch: each mapped index is a batch of its own.
    chunks = [x.chunk(size) if isinstance(x, Tensor) and name != "sinks" else [x] * size for name, x in folded.items()]
    return tuple(torch.stack(parts) for parts in zip(*(op(*chunk) for chunk in zip(*chunks, strict=True)), strict=True))


def _refuse(op: Op, *_: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError(f"{op.name}: torch.vmap is not built; pack more entries, or map flash_attention")


def _register(op: Op, batch: Callable) -> None:
    def rule(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = batch(op, info.batch_size, in_dims, values)
        return results, (0,) * len(results)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        interpreter = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, rule, op, *op.values(args, kwargs))

    _dispatch.register(op, "FuncTorchBatched", kernel)


for _name in ("flash_attention", "flash_attention_backward"):
    _register(_dispatch.op(_name), _batch)
for _name in ("flash_attention_varlen", "flash_attention_varlen_backward"):
    _register(_dispatch.op(_name), _refuse)
