"""What a step is given: the device, the ops, and a place for its results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from diffqkv.benchmarks.common.timing import Clock, Events, Timer
from diffqkv.ops import dispatch

from .calls import TESTED_OPS, Call

_TOO_MANY = 100


class TooManyFailures(Exception):
    """There is no point in going on."""


class Context:
    """`result` is what the step reports; `save` keeps it in case the step does not come to its end."""

    def __init__(self, device: str, write: Callable[[dict], None]):
        self.device = torch.device(device)
        self.failures: list[str] = []
        self.result: dict = {}
        self._write = write

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def op(self, name: str) -> Callable:
        """The library's op, which is called by its schema."""
        return getattr(torch.ops.diffqkv, name).default

    def dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """The dtypes of the kernel, bfloat16 and float16 first."""
        order = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        return tuple(sorted(dispatch.OPS[name.removesuffix("_backward")].dtypes, key=order.index))

    def calls(self, name: str, *, stable: bool = False) -> list[tuple[str, Callable[[], Call]]]:
        """The calls that the op is tried with, each as a text and the function that makes it."""
        tested = TESTED_OPS[name]
        cases = (tested.stable_cases if stable else tested.cases)(self.dtypes(name), self.on_gpu)
        return [
            (str(case), lambda case=case, seed=seed: tested.make(case, seed, self.device))
            for seed, case in enumerate(cases)
        ]

    def poison(self, nbytes: int = 64 << 20) -> None:
        """Makes it likely that the memory an op allocates next holds NaN."""
        if self.on_gpu:
            for size in (nbytes, 1 << 20, 1 << 16):  # a block in each pool of the allocator
                torch.full((size // 4,), float("nan"), device=self.device)

    def timer(self, graph: bool) -> Timer:
        return Events(graph) if self.on_gpu else Clock(pool_bytes=1 << 20)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.save()
        if len(self.failures) >= _TOO_MANY:
            raise TooManyFailures

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(TooManyFailures):
            function(self, *arguments)
        self.finish()

    def save(self) -> None:
        partial = {"status": "error", "reason": "ended early"} | self.result
        self._write(partial | {"failures": self.failures})

    def finish(self) -> None:
        self.result.setdefault("status", "failed" if self.failures else "passed")
        if self.failures:
            self.result.setdefault("reason", f"{len(self.failures)} failures")
        self._write(self.result | {"failures": self.failures})
