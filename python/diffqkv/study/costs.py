"""The cost model: bytes that a decode step reads, and lines through what it takes (eq. 14 and 15).

Pure functions of shapes, and of the rate at which a machine reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.integrate import trapezoid

from .. import SigmaConfig

# Bits of a weight by the form of the weights; integers have a bfloat16 scale for each group of 32.
_BITS = {"int8": 8 + 16 / 32, "int4": 4 + 16 / 32}


def cache_elements(config: SigmaConfig) -> int:
    """Numbers that a token takes in the cache of a layer: n_k d_k + n_v d_v (section 2.3)."""
    return config.num_key_heads * config.k_head_dim + config.num_value_heads * config.head_dim


def augmented_q_weights(config: SigmaConfig, is_folded: bool) -> int:
    """Weights of a layer that augmented Q adds.

    is_folded: `fuse_for_inference` has multiplied q_proj into the gate and up projections, which then read the hidden
    state, and left it out.
    """
    if config.q_aug_dim is None:
        return 0
    q_size, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    if not is_folded:
        return 3 * q_size * config.q_aug_dim
    return (2 * hidden + q_size) * config.q_aug_dim - hidden * q_size


def other_weights(config: SigmaConfig) -> int:
    """Weights of a layer's projections without augmented Q, and of its FFN."""
    q_size, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    return hidden * (2 * q_size + cache_elements(config) + 3 * config.intermediate_size)


def weight_bytes(weights: int, form: str, itemsize: int) -> float:
    """Bytes of so many weights in a form of `fuse_for_inference`, or as they were loaded."""
    return weights * _BITS.get(form, 8 * itemsize) / 8


class Line(NamedTuple):
    """seconds = slope * x + offset: eq. 14 with alpha, beta, where x counts the elements of the cache."""

    slope: float
    offset: float

    def __call__(self, x: float) -> float:
        return self.slope * x + self.offset


def fit(x: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least squares of relative errors: a step of a long text weighs no more than one of a short."""
    y = np.asarray(seconds, dtype=float)
    if len(set(x)) < 2:
        return Line(0.0, float(y.mean()))
    slope, offset = np.polyfit(np.asarray(x, dtype=float), y, 1, w=1 / y)
    return Line(float(slope), float(offset))


class Costs(NamedTuple):
    """What a decode step of a layer costs by its bytes, at a rate of reading.

    Attributes:
        per_token: seconds for each cached token, of all sequences.
        augmented_q: seconds for the weights of augmented Q.
    """

    per_token: float
    augmented_q: float

    def total(self, tokens: float) -> float:
        """Attention, cache and augmented Q of a step, the paper's total."""
        return self.per_token * tokens + self.augmented_q


def costs(config: SigmaConfig, form: str, itemsize: int, batch: int, bytes_per_second: float) -> Costs:
    """The costs of a layer, if both are read at one rate. The cache has numbers of `itemsize` bytes."""
    added = augmented_q_weights(config, is_folded=form != "plain")
    return Costs(
        per_token=batch * cache_elements(config) * itemsize / bytes_per_second,
        augmented_q=weight_bytes(added, form, itemsize) / bytes_per_second,
    )


def crossover(ours: Line, theirs: Line) -> float | None:
    """The x from which ours costs no more than theirs: 0 where it never costs more, None where it always does."""
    saved_per_x, more = theirs.slope - ours.slope, ours.offset - theirs.offset
    if more <= 0:
        return 0.0 if saved_per_x >= 0 else None
    return more / saved_per_x if saved_per_x > 0 else None


def measured_crossover(contexts: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The context from which ours costs no more up to the last one, between points on straight lines; None: never."""
    more = [a - b for a, b in zip(ours, theirs, strict=True)]
    if more[-1] > 0:
        return None
    last = next((i for i in reversed(range(len(more))) if more[i] > 0), None)
    if last is None:
        return 0.0
    share = more[last] / (more[last] - more[last + 1])
    return contexts[last] + share * (contexts[last + 1] - contexts[last])


def cumulative(contexts: Sequence[int], seconds: Sequence[float], prefix: int, output: int) -> float:
    """Seconds of `output` steps behind `prefix` tokens: the sum of the broken line through what steps cost.

    Raises:
        ValueError: a step behind more tokens than were measured is asked for.
    """
    if prefix + output > contexts[-1]:
        raise ValueError(f"prefix + output: got {prefix + output}, want at most {contexts[-1]}")
    between = [c for c in contexts if prefix < c < prefix + output]
    x = np.array([prefix, *between, prefix + output], dtype=float)
    return float(trapezoid(np.interp(x, contexts, seconds), x))
