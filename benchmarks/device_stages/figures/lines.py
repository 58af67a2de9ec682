"""What the sections share: tensors, peers, a line of a table."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffqkv import reference

from ..context import Context
from .clock import Work, microseconds
from .targets import judged

N_Q, N_K, N_V = 32, 4, 16  # Sigma
_TOLERANCE = 0.02  # of the largest element, in bfloat16
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def random(context: Context, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=context.device).normal_()


def grouped(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, heads, s, d]` as caches."""
    groups = gcd(k.shape[1], v.shape[1])
    return reference.group(k, groups), reference.group(v, groups)


def expanded(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


def difference(got: Tensor, want: Tensor) -> float:
    """Of the largest element."""
    if got.shape != want.shape:
        return float("nan")
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def fits(context: Context, nbytes: float) -> bool:
    return not context.on_gpu or nbytes < 0.9 * torch.cuda.mem_get_info()[0]


def add_line(
    context: Context, section: str, line: dict, error: float, ours: list[Work],
    others: dict[str, Callable[[], tuple[list[Work], float]]],
    finish: Callable[[dict[str, float]], dict], *, graph: bool,
) -> None:  # fmt: skip
    """Times ours and the others, and appends the line to the result. No times if `error`, a `difference`, is too large.

    others: by name, what makes the calls, and says how far their result is from ours. finish: what follows from the
    times in µs.
    """
    rows = context.result.setdefault("rows", [])
    if not error <= _TOLERANCE:
        context.fail(f"{line['name']}: error {error:.3g} of the largest element, allowed {_TOLERANCE}")
        return
    contenders, notes = {"ours": ours}, []
    for name, make in others.items():
        try:
            works, apart = make()
        except Exception as failure:  # whatever a peer raises
            notes.append(f"{name}: {_first_line(failure)}")
            continue
        if apart <= 2 * _TOLERANCE:
            contenders[name] = works
        else:
            notes.append(f"{name}: another result, {apart:.2g} apart")
    times, without = microseconds(context, contenders, graph=graph)
    if "ours" not in times:
        context.fail(f"{line['name']}: {without['ours']}")
        return
    notes += [f"{name}: {why}" for name, why in without.items()]
    line = line | {"µs": times["ours"]} | finish(times)
    for name in others:
        line[f"{name} µs"] = times.get(name)
        line[f"ours / {name}"] = times["ours"] / times[name] if name in times else None
    rows.append(line | {"targets": judged(section, line), "notes": notes})
    context.save()
    if context.on_gpu:
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
