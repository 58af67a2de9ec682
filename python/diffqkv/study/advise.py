"""From which context on a shape pays, by the bytes that a step reads: an answer without a measurement of the shape."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import SigmaConfig
from ..benchmarks.common.inputs import dtype_name
from ..benchmarks.common.timing import Clock, interleaved
from ..benchmarks.cpu import limits
from ..installation import _core
from ..ops.checks import wrong
from .costs import Costs, augmented_q_weights, cache_elements, costs
from .systems import PLAIN, System

_PROBE_BYTES = 512 << 20
_CONTEXTS = [1 << i for i in range(8, 21)]


class Advice(NamedTuple):
    """Where a shape beats its GQA twin.

    Attributes:
        total_from: the context from which cache, attention and augmented Q take less; None: never.
        ours, theirs: what a layer's step costs.
        sentences: the answer, three of them.
    """

    total_from: float | None
    ours: Costs
    theirs: Costs
    sentences: list[str]


def reading_rate(device: str) -> tuple[float, str]:
    """Bytes per second that a machine reads at best, and how that is known: measured here, or a GPU's specification.

    Raises:
        ValueError: there is no such device.
    """
    if device == "cpu":
        read = limits.read(_PROBE_BYTES)
        times, _ = interleaved(Clock(), {read.name: [read.run]}, seconds=1.0)
        how = f"reading {_PROBE_BYTES >> 20} MiB here, {torch.get_num_threads()} threads"
        return read.work / times[read.name].median, how
    if device == "cuda" and torch.cuda.is_available():
        data = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            begin.record()
            data.clone()
            end.record()
            end.synchronize()
        return 2e3 * _PROBE_BYTES / begin.elapsed_time(end), "copying on this GPU"
    known = _core.GPUS if _core is not None else {}
    if device not in known:
        raise wrong("--device", repr(device), f"'cpu', 'cuda' where there is one, or one of {', '.join(known)}")
    return known[device].bandwidth_gb_s * 1e9, f"the specification of {device}"


def advise(
    config: SigmaConfig, twin: System, form: str, dtype: torch.dtype, batch: int, bytes_per_second: float
) -> Advice:
    """Compares a shape with its twin, `systems_of(config)["std"]`, whose augmented Q does not count."""
    standard = twin.config(config, config.num_hidden_layers)
    ours, theirs = (costs(c, form, dtype.itemsize, batch, bytes_per_second) for c in (config, standard))
    saved = theirs.per_token - ours.per_token
    total_from = ours.augmented_q / saved if saved > 0 else None
    sentences = _sentences(config, standard, dtype, batch, ours, theirs, form)
    return Advice(total_from, ours, theirs, sentences)


def _sentences(
    config: SigmaConfig, standard: SigmaConfig, dtype: torch.dtype, batch: int, ours: Costs, theirs: Costs, form: str
) -> list[str]:
    elements, others = cache_elements(config), cache_elements(standard)
    shape = f"{config.num_attention_heads}/{config.num_key_heads}/{config.num_value_heads}"
    gqa = f"GQA-{standard.num_key_heads}"
    saved = theirs.per_token - ours.per_token
    if saved <= 0:
        return [
            f"Heads {shape} take {elements:,} numbers per token and layer, no less than the {others:,} of {gqa}: "
            "attention and its cache save nothing.",
            "The total saves nothing either, at any length.",
            "What limits it is the number of K heads and their size, which are those of the twin.",
        ]
    first = (
        f"Heads {shape} take {elements:,} numbers per token and layer where {gqa} takes {others:,}: attention and the "
        f"cache save {1 - elements / others:.1%} of what they read, from the first token on."
    )
    if ours.augmented_q == 0:
        return [
            first,
            "Without augmented Q the total saves as much, at every length.",
            "What limits the whole step is the reading of all other weights.",
        ]
    crossing = ours.augmented_q / saved
    second = (
        f"With augmented Q a step costs less from {crossing:,.0f} tokens on (batch {batch}, {form} weights, "
        f"{dtype_name(dtype)} cache)"
    )
    if form == PLAIN:
        folded, loaded = (augmented_q_weights(config, is_folded) for is_folded in (True, False))
        second += f", from {folded / loaded * crossing:,.0f} after fuse_for_inference"
    third = (
        "What limits it below are the weights of augmented Q, which each step reads once: as much as "
        f"{ours.augmented_q / ours.per_token:,.0f} tokens of the cache, shared by {batch} sequences"
    )
    return [first, second + ".", third + "; a larger batch crosses earlier."]


def curves(advice: Advice, layers: int) -> tuple[list[int], list[float], list[float]]:
    """Contexts, and seconds of the paper's total in all layers: ours, and the twin's without augmented Q."""
    ours = [layers * advice.ours.total(context) for context in _CONTEXTS]
    return _CONTEXTS, ours, [layers * advice.theirs.per_token * context for context in _CONTEXTS]
