"""torch.vmap over the training attention: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import wrong
from ..op import Op


def _fold(x: Any, dim: int | None, size: int) -> Any:
    """`[size, b, ...]` -> `[size * b, ...]`; what is not mapped is the same for all."""
    if not isinstance(x, Tensor):
        return x
    x = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
    return x if x.dim() == 4 and x.stride(-1) == 1 else x.contiguous()


def over_batch(op: torch._ops.OpOverload) -> Callable:
    """The rule of attention of a batch, and of its gradients."""
    name = op._opname
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, inputs, dims = info.batch_size, dict(zip(names, args)), dict(zip(names, in_dims))  # noqa: B905
        if dims.get("sinks") is not None:
            raise wrong("sinks", "a mapped dimension", f"none: under torch.vmap all of {name} has the same sinks")
        if inputs.get("dropout_p", 0) != 0:
            raise wrong("dropout_p", inputs["dropout_p"], f"0 under torch.vmap: a seed is one mask for all of {name}")
        folded = [x if n == "sinks" else _fold(x, dims[n], size) for n, x in inputs.items()]
        if inputs.get("sinks") is None or "dout" not in inputs:
            results = tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in op(*folded))
        else:
            # The gradient of the sinks is a sum over a batch: each mapped index is a batch of its own.
            chunks = [
                x.chunk(size) if isinstance(x, Tensor) and n != "sinks" else [x] * size
                for n, x in zip(inputs, folded, strict=True)
            ]
            each = [op(*chunk) for chunk in zip(*chunks, strict=True)]
            results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return results, (0,) * len(results)

    return rule


def not_built(op: torch._ops.OpOverload) -> Callable:
    """The rule of attention of packed sequences, which has no batch to fold into."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> None:
        raise NotImplementedError(f"{op._opname}: torch.vmap is not built; pack more entries, or map flash_attention")

    return rule


def register(op: Op) -> None:
    if op.vmap is not None:
        torch.library.register_vmap(f"diffqkv::{op.name}", op.vmap(op.kernel))
