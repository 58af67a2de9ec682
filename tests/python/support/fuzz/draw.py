"""Random arguments: a `Draw` is made by one number and always draws the same."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65]
UNMAPPED = [2**31 - 1, -1, -(2**31), 10**6]
HUGE = [2**31 - 1, 2**31, 2**32, 2**62, sys.maxsize]

LARGEST = 28  # exponent of the largest scores


class Draw:
    def __init__(self, op: str, seed: int):
        # A string, as Python's hash() differs from run to run.
        self.random = random.Random(f"{op} {seed}")
        self._generator = np.random.default_rng(self.random.getrandbits(64))
        self.notes: list[str] = []  # what a failure says about the call

    def note(self, **facts: Any) -> None:
        self.notes += [f"{name} {fact}" for name, fact in facts.items()]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choice(self, *values: Any) -> Any:
        return self.random.choice(values)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    # ---- sizes

    def heads(self, most: int) -> tuple[int, int, int]:
        n_q = self.integer(1, max(1, most))
        divisors = [n for n in range(1, n_q + 1) if n_q % n == 0]
        return n_q, self.random.choice(divisors), self.random.choice(divisors)

    def dim(self) -> int:
        return self.choice(8, 16, 64, 8 * self.integer(1, 16), 8 * self.integer(1, 32))

    def length(self, most: int = 70) -> int:
        edges = [n for n in EDGES if n <= most]
        return self.random.choice(edges) if self.chance(0.4) else self.integer(0, most)

    def window(self) -> tuple[int, int]:
        def side() -> int:
            if self.chance(0.5):
                return -1
            if self.chance(0.3):
                return self.random.choice(HUGE) - self.choice(0, 0, self.integer(0, 70))
            return self.length()

        return side(), side()

    def bound(self, tokens: int) -> int:
        """Of kv_start or kv_end."""
        if self.chance(0.05):
            return self.choice(-(2**31), 2**31 - 1)
        return self.integer(-5, tokens + 5)

    # ---- numbers

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self._generator.standard_normal(shape))

    def tensor(self, *shape: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensor(self.normal(shape) * size, dtype)

    def q_and_k(self, q_shape: tuple, k_shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
        """q, k, and whether their dot products are exact in float32, which the kernels of float64 do not use."""
        q, k = self.normal(q_shape), self.normal(k_shape)
        style = self.choice("normal", "normal", "whole", "large", "outlier", "zero")
        if style in ("whole", "large"):
            q, k = (np.clip(np.round(x), -2, 2) for x in (q, k))
        if style == "large":
            # Scores near 2^power that differ by multiples of 2^unit; no sum of products needs more than 24 bits.
            power = self.integer(10, LARGEST)
            unit = max(0, power - self.integer(12, 22))
            q, k = q * 2.0 ** (unit // 2), k * 2.0 ** (unit - unit // 2)
            q[..., 0], k[..., 0] = 2.0 ** (power // 2), self.choice(-1, 1) * 2.0 ** (power - power // 2)
        elif style == "outlier":
            size = 10.0 ** self.integer(0, 4)
            k[..., self.integer(0, k.shape[-1] - 1)] *= size
        elif style == "zero":
            q *= 0
        elif style == "normal":
            q, k = q * self.choice(0.1, 1, 1, 3), k * self.choice(0.1, 1, 1, 3)
        self.note(scores=style)
        q, k = (tensor(x, dtype) for x in (q, k))
        return q, k, style in ("whole", "large", "zero") and dtype != torch.float64

    def v(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.tensor(*shape, size=self.choice(0.01, 1, 1, 1, 100), dtype=dtype)

    def scale(self) -> float | None:
        if self.chance(0.6):
            return None
        return self.choice(1.0, 0.125, -0.25, 0.0, self.random.uniform(-1, 1), self.random.uniform(0, 0.1))

    def softcap(self) -> float:
        return 0.0 if self.chance(0.6) else self.choice(0.5, 2.0, 30.0, self.random.uniform(0.1, 50), 1e4)

    def sinks(self, n_q: int, dtype: torch.dtype) -> Tensor | None:
        if self.chance(0.6):
            return None
        return self.tensor(n_q, size=self.choice(1, 10), dtype=self.choice(torch.float32, dtype))

    # ---- memory

    def laid_out(self, x: Tensor, inner: int = 1) -> Tensor:
        """x somewhere in a larger piece of memory, in any order of dimensions, with NaN around and between its rows.

        The last `inner` dimensions stay as they are, one behind another.
        """
        outer = x.dim() - inner
        if outer < 1 or self.chance(0.3):
            return x.contiguous().clone()
        order = list(range(outer))
        self.random.shuffle(order)
        steps = [self.choice(1, 1, 1, 2) for _ in order]
        extra = [self.choice(0, 0, 1, 3) for _ in order]
        whole = list(x.shape[outer:])
        if inner == 1:
            whole[0] += self.choice(0, 0, 8, 3)
        sizes = [x.shape[d] * steps[d] + extra[d] for d in order]
        offset = self.choice(0, 0, 1, 13)
        base = x.new_full((offset + math.prod(sizes) * math.prod(whole),), NAN)
        back = [order.index(d) for d in range(outer)]
        view = base[offset:].view(*sizes, *whole).permute(*back, *range(outer, x.dim()))
        firsts = [self.choice(0, n) for n in extra]
        cut = [slice(a, a + n * step, step) for a, n, step in zip(firsts, x.shape[:outer], steps, strict=True)]
        return view[tuple(cut)].narrow(outer, 0, x.shape[outer]).copy_(x)


def tensor(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(x)).to(dtype)


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
