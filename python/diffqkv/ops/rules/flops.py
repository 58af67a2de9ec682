"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`: unpadded dims, a multiply-add counts two."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..op import Op


def register(op: Op) -> None:
    if op.flops is None:
        return
    names = [argument.name for argument in op.kernel._schema.arguments]

    def formula(*args: Any, out_val: Any = None, **named: Any) -> int:
        return op.flops(**dict(zip(names, args, strict=False)), **named)

    register_flop_formula(getattr(torch.ops.diffqkv, op.name), get_raw=True)(formula)
