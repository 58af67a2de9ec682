"""swiglu, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import inaccurate
from diffqkv.benchmarks.common.inputs import NAN, dtype_name

from .base import Call, Source, TestedOp

_SHAPES = [(3, 5, 1024), (1,), (0, 4), (7, 33), (2, 3, 1001), (64, 6144)]


@dataclass(frozen=True)
class SwigluCase:
    dtype: torch.dtype
    shape: tuple[int, ...] = (3, 5, 1024)
    memory: str = "dense"  # dense, unaligned, transposed
    extreme: bool = False

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{dtype_name(self.dtype)}, {shape}, {self.memory}{', extreme' if self.extreme else ''}"


class Swiglu(TestedOp):
    by_entry = dict.fromkeys(("gate", "up", "dout", "out", "dgate", "dup"), 0)

    def __init__(self, backward: bool):
        self.backward = backward
        self.op = "swiglu_backward" if backward else "swiglu"

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[SwigluCase]:
        return [
            SwigluCase(dtype, shape, memory, extreme)
            for dtype in dtypes
            for shape, memory, extreme in (
                *((shape, "dense", False) for shape in _SHAPES),
                ((7, 33), "unaligned", False),
                ((2, 3, 1001), "unaligned", False),
                ((6, 10, 16), "transposed", False),
                ((9,), "dense", True),
            )
        ]

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[SwigluCase]:
        return [SwigluCase(dtypes[0], (3, 1001)), SwigluCase(dtypes[1], (3, 100_000 if on_gpu else 1000), "unaligned")]

    def entries(self, call: Call) -> int:
        return call.case.shape[0]

    def make(self, case: SwigluCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)
        names = ("gate", "up", "dout") if self.backward else ("gate", "up")
        args = {}
        for name in names:
            x = 3 * source.normal(*case.shape)
            if case.extreme:
                values = [0.0, -0.0, 1e4, -1e4, 88.0, -88.0, -104.0, torch.inf, NAN]
                x = torch.tensor(values, device=device) if name == "gate" else torch.ones(9, device=device)
            args[name] = self._placed(x.to(case.dtype), case.memory)

        def verify(results: dict[str, Tensor]) -> list[str]:
            exact, low = (self._specified(args, dtype) for dtype in (torch.float64, case.dtype))
            wrong = []
            for name, e, lo in zip(results, exact, low, strict=True):
                got = results[name]
                if case.extreme and self.backward:  # the gradient of an infinite gate depends on the formula
                    got, e, lo = (x[:7] for x in (got, e, lo))
                wrong += inaccurate(name, got, e, lo, factor=3 if self.backward else 2)
            return wrong

        return Call(self.op, case, args, ("dgate", "dup") if self.backward else ("out",), verify)

    @staticmethod
    def _placed(x: Tensor, memory: str) -> Tensor:
        if memory == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if memory == "unaligned":
            return x.new_full((x.numel() + 3,), NAN)[1:-2].view(x.shape).copy_(x)
        return x

    def _specified(self, args: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        gate, up = (args[name].to(dtype).requires_grad_(self.backward) for name in ("gate", "up"))
        out = reference.swiglu(gate, up, dtype)
        return torch.autograd.grad(out, (gate, up), args["dout"].to(dtype)) if self.backward else (out,)
