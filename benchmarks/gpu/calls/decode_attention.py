"""decode_attention: over caches, with windows, softcap and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import far, inaccurate

from .base import Call, Source, rarely
from .caches import CachedCase, OnCache, cached, drawn_cached

_LONG_DIMS = [(64, 64), (64, 128)]


@dataclass(frozen=True)
class DecodeCase(CachedCase):
    window: int = rarely(-1, 0, 9, 130)
    softcap: float = rarely(0.0, 1.5)
    sinks: bool = rarely(False, True)


class DecodeAttention(OnCache):
    op = "decode_attention"

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[DecodeCase]:
        known = [
            DecodeCase(dtypes[0]),
            DecodeCase(dtypes[0], batch=5, s_q=3, padded=True, page=16),
            DecodeCase(dtypes[0], (12, 6, 4), (64, 128), window=9, sinks=True, softcap=1.5),
            DecodeCase(dtypes[-1], (8, 1, 8), (40, 56), s_q=16, memory="tokens first", gap=3, scale=-0.25),
        ]
        if on_gpu:  # many splits
            known += [DecodeCase(dtype, capacity=70000, batch=1, dims=dims) for dtype in dtypes for dims in _LONG_DIMS]
        return known + drawn_cached(DecodeCase, dtypes, on_gpu, 300 if on_gpu else 10)

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[DecodeCase]:
        plain = DecodeCase(dtypes[0], batch=3, capacity=9000 if on_gpu else 200)
        paged = DecodeCase(dtypes[1], (12, 4, 6), (64, 128), batch=3, s_q=3, page=32, padded=True, capacity=1500)
        return [plain, paged]

    def make(self, case: DecodeCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)
        cache = cached(case, source)
        sinks = source.normal(case.heads[0]) if case.sinks else None
        options = {"softcap": case.softcap, "sinks": sinks}
        args = cache.args | options | {"window_left": case.window, "window_right": -1}
        known = cache.args | options | {"window": (case.window, -1)}

        def verify(results: dict[str, Tensor]) -> list[str]:
            exact, exact_lse = reference.decode_attention(**known, return_lse=True, dtype=torch.float64)
            low = reference.decode_attention(**known, dtype=case.dtype)
            return inaccurate("out", results["out"], exact, low) + far("lse", results["lse"], exact_lse)

        return Call(self.op, case, args, ("out", "lse"), verify)
