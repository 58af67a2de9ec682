"""selective_v_attention: over caches, with ties, forced rows, bounds of the error and every tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffqkv.benchmarks.common.accuracy import far, inaccurate

from .base import Call, Source, evenly, rarely
from .caches import Cached, CachedCase, OnCache, cached, drawn_cached

_TAILS = ("drop", "renorm", "mean")


@dataclass(frozen=True)
class SelectiveCase(CachedCase):
    top_k: int = evenly(30, 1, 7, 30, 100, 250, 3000)
    tail: str = evenly("drop", *_TAILS)
    keep_first: int = rarely(0, 4)
    keep_last: int = rarely(0, 5)
    stats: bool = rarely(False, True)
    bound: bool = evenly(True, True, False)
    max_error: float | None = rarely(None, 1e-4, 0.3, 2.0)
    ties: bool = rarely(False, True)  # scores are small integers


class SelectiveVAttention(OnCache):
    op = "selective_v_attention"
    results = ("out", "lse", "kept_mass", "indices", "rows_used", "error_bound")
    by_entry = OnCache.by_entry | dict.fromkeys(("v_stats", *results), 0)

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[SelectiveCase]:
        known = [
            SelectiveCase(dtypes[0]),
            SelectiveCase(dtypes[0], tail="renorm", ties=True, top_k=33),
            SelectiveCase(dtypes[0], (12, 4, 6), batch=5, s_q=3, page=16, padded=True, tail="mean", stats=True),
            SelectiveCase(dtypes[0], (12, 6, 4), (64, 128), keep_first=4, keep_last=5, top_k=7),
            SelectiveCase(dtypes[-1], max_error=0.3, top_k=20),
            SelectiveCase(dtypes[-1], (5, 1, 5), (40, 56), top_k=250, bound=False),
        ]
        if on_gpu:
            known += [SelectiveCase(dtype, capacity=70000, batch=1, top_k=100) for dtype in dtypes]
        return known + drawn_cached(SelectiveCase, dtypes, on_gpu, 250 if on_gpu else 10)

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[SelectiveCase]:
        capacity = 9000 if on_gpu else 200
        ties = SelectiveCase(dtypes[0], batch=3, capacity=capacity, ties=True, top_k=100)
        return [
            ties,
            SelectiveCase(dtypes[1], (12, 4, 6), (64, 128), batch=3, s_q=3, page=32, padded=True, tail="mean"),
        ]

    def make(self, case: SelectiveCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)

        def small_integers(*shape: int) -> Tensor:
            return source.integers(-2, 2, *shape).to(case.dtype).to(device)

        cache = cached(case, source, small_integers if case.ties else None)
        stats = torch.cat([cache.v.float().sum(2), cache.v.float().norm(dim=-1).amax(2)[..., None]], dim=-1)
        options = {"keep_first": case.keep_first, "keep_last": case.keep_last, "max_error": case.max_error}
        options |= {"v_stats": stats.contiguous() if case.stats else None}
        options |= {"return_bound": case.bound, "return_indices": True}
        args = cache.args | options | {"top_k": case.top_k, "tail": _TAILS.index(case.tail)}

        def verify(results: dict[str, Tensor]) -> list[str]:
            return _Selection(case, cache, stats.double()).wrong_with(results)

        return Call(self.op, case, args, self.results, verify)


class _Selection:
    """The definition in float64, given which rows the op chose: near ties may go either way, all else follows."""

    def __init__(self, case: SelectiveCase, cache: Cached, stats: Tensor):
        self.case, self.cache = case, cache
        n_q = case.heads[0]
        self.q, self.k = cache.args["q"], cache.k.repeat_interleave(n_q // cache.k.shape[1], dim=1)
        self.v = cache.v.repeat_interleave(n_q // cache.v.shape[1], dim=1)
        stats = stats.repeat_interleave(n_q // stats.shape[1], dim=1)
        self.v_norm = stats[..., -1:]
        self.scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
        self.scores = self.q.double() @ self.k.double().transpose(2, 3)
        self.visible = cache.visible.expand_as(self.scores)
        self.count = self.visible.sum(-1)
        self.v_mean = (
            self.visible.double() @ self.v.double() / self.count.clamp_min(1)[..., None]
        )  # the mean of the visible rows

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scores = self.scores if dtype == torch.float64 else self.q @ self.k.transpose(2, 3)
        logits = (scores.to(dtype) * self.scale).masked_fill(~self.visible, float("-inf"))
        lse = logits.logsumexp(-1)
        return (logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp(), lse

    def out(self, used: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Without the rows that are not used, and the mass of those that are."""
        kept = torch.where(used, self.weights(dtype)[0], 0)
        mass = kept.sum(-1)
        out = kept @ self.v.to(dtype)
        if self.case.tail == "renorm":
            out = torch.where(self.count[..., None] > 0, out / mass[..., None], out)
        elif self.case.tail == "mean":
            rest = torch.where(self.count > 0, 1 - mass, 0).clamp_min(0)
            out = out + rest[..., None] * self.v_mean.to(dtype)
        return out, mass

    def wrong_with(self, results: dict[str, Tensor]) -> list[str]:
        case, capacity = self.case, self.case.capacity
        indices, rows_used = results["indices"], results["rows_used"].long()
        exact_lse = self.weights(torch.float64)[1]
        wrong = far("lse", results["lse"], exact_lse)
        listed = indices >= 0
        if indices.dtype != torch.int64 or indices.shape != (*self.count.shape, case.top_k):
            return [*wrong, f"indices: {indices.dtype} {list(indices.shape)}"]
        if not torch.equal(listed.sum(-1), self.count.clamp_max(case.top_k)):
            return [*wrong, "indices: not min(top_k, visible keys) of them"]
        if not bool(((indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]).all()):
            return [*wrong, "indices: not ascending, then -1"]
        at = torch.where(listed, indices, capacity)
        if int(at.max()) > capacity:
            return [*wrong, f"indices: {int(at.max())} in a cache of {capacity}"]
        best = torch.zeros(*self.count.shape, capacity + 1, dtype=torch.bool, device=at.device).scatter(-1, at, True)
        best = best[..., :capacity]
        if bool((best & ~self.visible).any()):
            wrong.append("indices: a key that the query does not see")
        wrong += self._wrong_choice(best)

        rank = self.visible.cumsum(-1)
        last = rank > self.count[..., None] - case.keep_last
        used = best | self.visible & ((rank <= case.keep_first) | last)
        dense = self.out(self.visible, torch.float64)[0]
        distance = (results["out"].double() - dense).norm(dim=-1)
        rounding = 2 * torch.finfo(case.dtype).eps * dense.norm(dim=-1) + 1e-5
        if case.max_error is None:
            if not torch.equal(rows_used, used.sum(-1)):
                wrong.append("rows_used: not those listed and forced")
            exact, mass = self.out(used, torch.float64)
            mass = torch.where(rows_used == self.count, (self.count > 0).double(), mass)
            factor = 3 if case.tail == "renorm" else 2  # a quotient of two sums
            wrong += inaccurate("out", results["out"], exact, self.out(used, case.dtype)[0], factor)
            wrong += far("kept_mass", results["kept_mass"], mass, 5e-5)
        else:
            if not bool((rows_used >= used.sum(-1)).all()) or not bool((rows_used <= self.count).all()):
                wrong.append("rows_used: fewer than listed and forced, or more than there are")
            if not bool((distance <= case.max_error + rounding).all()):
                wrong.append(f"out: {float(distance.max()):.3g} from dense attention, allowed {case.max_error}")
        return wrong + self._wrong_bound(results, distance, rounding)

    def _wrong_choice(self, best: Tensor) -> list[str]:
        if self.case.ties:  # exact in float32, so the order is total
            sign = -1 if self.scale < 0 else 1
            key = torch.where(self.visible, sign * self.scores, float("-inf"))
            order = key.argsort(dim=-1, descending=True, stable=True)[..., : self.case.top_k]
            want = torch.zeros_like(best).scatter(-1, order, True) & self.visible
            return [] if torch.equal(best, want) else ["indices: ties are not broken by index"]
        key = self.scores * (-1 if self.scale < 0 else 1)
        worst_in = key.masked_fill(~best, float("inf")).amin(-1)
        best_out = key.masked_fill(best | ~self.visible, float("-inf")).amax(-1)
        slack = 4e-6 * self.q.double().norm(dim=-1) * self.k.double().norm(dim=-1).amax(-1, keepdim=True)
        bad = int((worst_in < best_out - slack).sum())
        return [f"indices: {bad} rows leave out a better one"] if bad else []

    def _wrong_bound(self, results: dict[str, Tensor], distance: Tensor, rounding: Tensor) -> list[str]:
        bound = results["error_bound"].double()
        if not self.case.bound and self.case.max_error is None:
            return [] if bool((bound == float("inf")).all()) else ["error_bound: not inf where it was not asked for"]
        wrong = []
        if not bool((distance <= bound + rounding).all()):
            wrong.append("error_bound: below the error")
        if self.case.max_error is not None and not bool((bound <= self.case.max_error).all()):
            wrong.append("error_bound: above max_error")
        radius = self.v_norm + {"drop": 0, "renorm": results["out"].double().norm(dim=-1)}.get(
            self.case.tail, self.v_mean.norm(dim=-1)
        )
        most = (1 - results["kept_mass"].double()).clamp_min(0) * radius * 1.001 + 1e-4 * radius
        if self.case.max_error is None and not bool((bound <= most).all()):
            wrong.append("error_bound: more than the rest of the mass allows")
        return wrong
