"""What the lines of all ops share: their sizes and inputs, and how one is measured beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffqkv.benchmarks.common.inputs import N_K, N_V
from diffqkv.benchmarks.common.line import Contenders, Limit, measure
from diffqkv.benchmarks.common.targets import Target
from diffqkv.benchmarks.common.timing import Calls, first_line

from ..context import Context

K = 1024
_TOLERANCE = 0.02  # twice that of the CPU's lines: some results are compared with others in bfloat16
_APART = 0.04  # the distance of a peer's results from ours
_SECONDS = 0.25  # per line

Peaks = dict[str, float]  # read_gb_s, copy_gb_s, bf16_tflops
# What makes the calls of a peer, and says how far their results are from ours.
Peer = Callable[[], tuple[Calls, float]]


class Size(NamedTuple):
    name: str
    batch: int = 1
    tokens: int = 0
    dims: str = ""
    nbytes: int = 0  # that a call reads and writes

    def __str__(self) -> str:
        return self.name


def sized(batch: int, tokens: int, dims: tuple[int, int], nbytes: int = 0) -> Size:
    thousands = f"{tokens // K}k" if tokens % K == 0 else str(tokens)
    d = "/".join(map(str, dims))
    return Size(f"batch {batch}, {thousands}, dims {d}", batch, tokens, d, nbytes)


def random(context: Context, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=context.device).normal_()


def cached(context: Context, batch: int, tokens: int, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tuple(random(context, batch, heads, tokens, d) for heads, d in zip((N_K, N_V), dims, strict=True))


def fits(context: Context, size: Size, nbytes: float) -> bool:
    if context.on_gpu and nbytes >= 0.9 * torch.cuda.mem_get_info()[0]:
        context.result.setdefault("left_out", []).append(f"{size}: not enough memory")
        return False
    return True


def add_line(
    context: Context,
    op: str,
    size: Size,
    who: Contenders,
    others: dict[str, Peer],
    *,
    graph: bool,
    targets: Sequence[Target] = (),
) -> None:
    """Measures a line beside those of the others that can be called and compute the same, and appends its record."""
    notes = []
    if who.tolerance is None:
        who = who._replace(tolerance=_TOLERANCE)
    for name, make in others.items() if who.error <= who.tolerance else ():
        try:
            calls, apart = make()
        except Exception as failure:  # whatever a peer raises
            notes.append(f"{name}: {first_line(failure)}")
            continue
        if apart <= _APART:
            who.peers[name] = calls
        else:
            notes.append(f"{name}: another result, {apart:.2g} apart")
    who = who._replace(notes=notes)
    try:
        record = measure(op, size, torch.bfloat16, _SECONDS, who, context.timer(graph), targets)
    except RuntimeError as failure:
        context.fail(f"{size}: {first_line(failure)}")
        return
    if record["correct"]:
        context.result.setdefault("rows", []).append(record)
        context.save()
    else:
        context.fail(f"{size}: error {who.error:.3g}, allowed {who.tolerance}")
    if context.on_gpu:
        torch.cuda.empty_cache()


def limit(name: str, peaks: Peaks) -> Limit:
    if name == "matmul":
        return Limit(name, "FLOP/s", per_second=peaks["bf16_tflops"] * 1e12)
    return Limit(name, "B/s", per_second=peaks[f"{name}_gb_s"] * 1e9)


def target(op: str, column: str, sign: str, value: float, where: Callable[[dict], bool], source: str = "") -> Target:
    return Target(op, column, sign, None, value, where=where, source=source)


def faster_than_peers(op: str) -> list[Target]:
    return [target(op, x, ">", 1.0, lambda record: True) for x in ("cuDNN", "flash", "flash_attn", "flashinfer")]
