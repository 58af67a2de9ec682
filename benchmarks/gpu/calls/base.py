"""A call of an op, with poison in every unused place, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from diffqkv.benchmarks.common.inputs import HEADS, dtype_name

DIMS = [(64, 64), (128, 128), (64, 128), (32, 64)]
ODD_DIMS = [(40, 56), (8, 256), (256, 8), (128, 24), (16, 248), (256, 256)]


def evenly(default: Any, *choices: Any) -> Any:
    """A field that `drawn` takes from the choices."""
    return field(default=default, metadata={"choices": choices, "probability": 1.0})


def rarely(default: Any, *choices: Any) -> Any:
    """A field that `drawn` takes from the choices now and then; most cases leave it at its default."""
    return field(default=default, metadata={"choices": choices, "probability": 0.3})


@dataclass(frozen=True)
class Case:
    """A combination of options. Its text names those that are not left at their defaults."""

    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int, int] = evenly((32, 4, 16), *HEADS)
    dims: tuple[int, int] = (64, 64)

    def __str__(self) -> str:
        heads, dims = "/".join(map(str, self.heads)), "/".join(map(str, self.dims))
        parts = [dtype_name(self.dtype), f"heads {heads}", f"dims {dims}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("dtype", "heads", "dims") and (f.default is MISSING or value != f.default):
                shown = dtype_name(value) if isinstance(value, torch.dtype) else value
                parts.append(f.name if value is True else f"{f.name} {shown}")
        return ", ".join(parts)


def drawn(kind: type[Case], dtypes: Sequence[torch.dtype], random: Random, **given: Any) -> Case:
    """A random case, as its fields say where they are not given. The first two dtypes are the most frequent."""
    dims = random.choice(ODD_DIMS if random.random() < 0.3 else DIMS)
    given |= {"dtype": random.choice((*dtypes, *dtypes[:2])), "dims": dims}
    for f in fields(kind):
        if f.name not in given and random.random() < f.metadata.get("probability", 0):
            given[f.name] = random.choice(f.metadata["choices"])
    return kind(**given)


@dataclass
class Call:
    """A call of an op: the schema's `args` by name, and of those that it writes the whole storage (`written`)."""

    op: str
    case: Any
    args: dict[str, Any]
    results: tuple[str, ...]
    verify: Callable[[dict[str, Tensor]], list[str]]
    written: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = {name: x.clone() for name, x in self.written.items()}

    def run(self, op: Callable) -> dict[str, Tensor]:
        """What the op returned, and the storages that it may have written, by name."""
        returned = op(**self.args)
        returned = (returned,) if isinstance(returned, Tensor) else returned or ()
        return dict(zip(self.results, returned, strict=True)) | self.written

    def reset(self) -> None:
        for name, x in self.written.items():
            x.copy_(self.before[name])


class TestedOp:
    """An op under test: its cases, and the calls that they stand for."""

    op: str
    # The dimension of arguments and results in which their batch entries lie.
    by_entry: dict[str, int] = {}
    # The arguments that the kernel reads by their strides, however large. Without any, it packs what it is given.
    any_strides: tuple[str, ...] = ()

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[Case]:
        """All cases. The first one is small and plain."""
        raise NotImplementedError

    def make(self, case: Any, seed: int, device: torch.device) -> Call:
        raise NotImplementedError

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[Case]:
        """The cases that are repeated, and whose entries are computed alone."""
        raise NotImplementedError

    def entries(self, call: Call) -> int:
        return call.case.batch

    def alone(self, call: Call, entry: int) -> tuple[Call, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
        """The call of one batch entry, and the function that takes its part of the results of all."""
        args = {
            name: x.narrow(self.by_entry[name], entry, 1) if isinstance(x, Tensor) and name in self.by_entry else x
            for name, x in call.args.items()
        }
        return replace(call, args=args), lambda results: {
            name: x.narrow(self.by_entry[name], entry, 1) for name, x in results.items() if name in self.by_entry
        }


class Source:
    """Random tensors, drawn on the CPU so that every device gets the same numbers."""

    def __init__(self, seed: int, device: torch.device):
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 from low to high, both included; on the CPU."""
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int32)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)
