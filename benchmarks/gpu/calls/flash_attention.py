"""flash_attention and flash_attention_varlen, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from diffqkv import reference
from diffqkv.benchmarks.common.accuracy import far, inaccurate
from diffqkv.benchmarks.common.inputs import NAN, poison_absent, strided

from .base import Call, Case, Source, TestedOp, drawn, evenly, rarely

_SHORT = [(1, 1), (2, 1), (0, 5), (5, 0), (31, 33), (33, 31), (64, 64), (113, 203), (203, 113)]
_LONG = [(1023, 1024), (1, 2000), (300, 300), (129, 257), (640, 128), (512, 512)]
_DROPOUT_SEED, _DROPOUT_OFFSET = -(2**40) - 7, 3


@dataclass(frozen=True)
class FlashCase(Case):
    batch: int = evenly(2, 1, 2, 3)
    s_q: int = 64  # the length; that of the longest of packed entries
    s_k: int = 64
    causal: bool = evenly(False, False, True)
    window: tuple[int, int] = rarely((-1, -1), (9, 4), (7, -1), (40, 0), (-1, 3))
    softcap: float = rarely(0.0, 1.5)
    scale: float | None = rarely(None, 0.4, -0.25, 0.0)
    sinks: str = rarely("", "float32", "as q")
    padded: bool = rarely(False, True)
    dropout: float = rarely(0.0, 0.3)
    memory: str = rarely("dense", "tokens first", "gaps")
    dlse: bool = rarely(False, True)


def _options(case: FlashCase, source: Source, start: Tensor | None, end: Tensor | None) -> dict[str, Any]:
    sinks = None
    if case.sinks:
        sinks = source.normal(case.heads[0], dtype=torch.float32 if case.sinks == "float32" else case.dtype)
    return {
        "causal": case.causal,
        "softmax_scale": case.scale,
        "window_left": case.window[0],
        "window_right": case.window[1],
        "softcap": case.softcap,
        "sinks": sinks,
        "kv_start": start,
        "kv_end": end,
        "dropout_p": case.dropout,
        "seed": _DROPOUT_SEED if case.dropout else 0,
        "offset": _DROPOUT_OFFSET if case.dropout else 0,
    }


def _as_reference(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    return options | {"window": (options.pop("window_left"), options.pop("window_right"))}


class _FlashAttention(TestedOp):
    forward: str

    def __init__(self, backward: bool):
        self.backward = backward
        self.op = self.forward + ("_backward" if backward else "")
        self.any_strides = ("q", "k", "v", "dout", "out") if backward else ("q", "k", "v")

    def cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[FlashCase]:
        lengths = _SHORT + _LONG * 2 if on_gpu else _SHORT
        known = [
            FlashCase(dtypes[0]),
            FlashCase(dtypes[0], causal=True, s_q=113, s_k=203),
            FlashCase(dtypes[0], (12, 4, 6), padded=True, s_q=40, s_k=70),
            FlashCase(dtypes[0], (12, 6, 4), (64, 128), dropout=0.3, sinks="float32"),
            FlashCase(dtypes[0], (8, 1, 8), causal=True, window=(7, -1), softcap=1.5, dlse=True),
        ]
        random = Random(self.op)  # the same cases in every run
        pairs = (random.choice(lengths) for _ in range(240 if on_gpu else 10))
        return known + [drawn(FlashCase, dtypes, random, s_q=s_q, s_k=s_k) for s_q, s_k in pairs]

    def stable_cases(self, dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[FlashCase]:
        s = 700 if on_gpu else 70
        plain = FlashCase(dtypes[0], batch=3, s_q=s, s_k=s, causal=True)
        return [
            plain,
            FlashCase(dtypes[1], (12, 4, 6), (64, 128), batch=3, s_q=s // 2, s_k=s, padded=True, softcap=2.0),
        ]

    def _gradients(
        self, specification: Callable, tensors: Sequence[Tensor], sinks: Tensor | None, dout: Tensor,
        dlse: Tensor | None, dtype: torch.dtype, options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """out, lse, and the gradients of q, k, v and, if there are any, the sinks, all in dtype."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        sinks = None if sinks is None else sinks.detach().to(dtype).requires_grad_()
        out, lse = specification(*leaves, sinks=sinks, return_lse=True, dtype=dtype, **options)
        outputs, given = [out], [dout.to(dtype)]
        if dlse is not None:
            outputs, given = [out, lse], [*given, dlse.to(dtype)]
        inputs = leaves if sinks is None else [*leaves, sinks]
        return out.detach(), lse.detach(), torch.autograd.grad(outputs, inputs, given)

    def _call(
        self, case: FlashCase, source: Source, specification: Callable, tensors: Sequence[Tensor],
        packed: dict[str, Any], options: dict[str, Any], shapes: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Call:  # fmt: skip
        """specification(q, k, v, **options of the reference); shapes of out and lse; packed: those arguments."""
        q, k, v = tensors
        known = _as_reference(options)
        sinks = known.pop("sinks")
        if not self.backward:

            def verify(results: dict[str, Tensor]) -> list[str]:
                exact, exact_lse = specification(q, k, v, sinks=sinks, return_lse=True, dtype=torch.float64, **known)
                low = specification(q, k, v, sinks=sinks, dtype=case.dtype, **known)
                return _formats(results, case) + (
                    inaccurate("out", results["out"], exact, low) + far("lse", results["lse"], exact_lse)
                )

            args = {"q": q, "k": k, "v": v} | packed | options
            return Call(self.op, case, args, ("out", "lse"), verify)

        dout = source.normal(*shapes[0], dtype=case.dtype)
        dlse = source.normal(*shapes[1], dtype=_wide(case.dtype)) if case.dlse else None
        exact = self._gradients(specification, tensors, sinks, dout, dlse, torch.float64, known)

        def verify(results: dict[str, Tensor]) -> list[str]:
            low = self._gradients(specification, tensors, sinks, dout, dlse, case.dtype, known)
            wrong = _formats(results, case)
            # A query of one key: dP - sum(out * dout) is 0, and dq and dk are what rounding leaves of it.
            scale = case.dims[0] ** -0.5 if case.scale is None else abs(case.scale)
            terms = scale * float((exact[0] * dout).norm(dim=-1).max()) if dout.numel() else 0.0
            cancelling = {"dq": terms * _largest(k), "dk": terms * _largest(q)}
            for name, want, lo in zip(("dq", "dk", "dv", "dsinks"), exact[2], low[2], strict=False):
                # Gradients of float32 sinks come from dout and out, and are no more exact than those.
                got = results[name]
                coarse = max(got.dtype, case.dtype, key=lambda dtype: torch.finfo(dtype).eps)
                got, lo = got.to(coarse), lo.to(coarse)
                wrong += inaccurate(name, got, want, lo, factor=3, cancelling=cancelling.get(name, 0.0))
            return wrong

        # What the forward pass leaves, rounded from the exact results: an error there is not one here.
        left = {"out": exact[0].to(case.dtype).contiguous(), "lse": exact[1].to(_wide(case.dtype)).contiguous()}
        args = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v} | left | packed | options
        return Call(self.op, case, args, ("dq", "dk", "dv", "dsinks"), verify)


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num(0).abs().max()) if x.numel() else 0.0


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse."""
    return torch.promote_types(dtype, torch.float32)


def _formats(results: dict[str, Tensor], case: FlashCase) -> list[str]:
    sinks = torch.float32 if case.sinks in ("", "float32") else case.dtype
    want = dict.fromkeys(results, case.dtype) | {"lse": _wide(case.dtype), "dsinks": sinks}
    return [
        f"{name}: {x.dtype}, strides {x.stride()}, want {want[name]}, contiguous"
        for name, x in results.items()
        if not x.is_contiguous() or x.dtype != want[name]
    ]


class FlashAttention(_FlashAttention):
    forward = "flash_attention"
    by_entry = dict.fromkeys(
        ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "kv_start", "kv_end"), 0
    )  # dsinks is a sum over the batch

    def make(self, case: FlashCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)
        (n_q, n_k, n_v), (d_k, d_v), b = case.heads, case.dims, case.batch
        q = source.normal(b, n_q, case.s_q, d_k, dtype=case.dtype)
        k = source.normal(b, n_k, case.s_k, d_k, dtype=case.dtype)
        v = source.normal(b, n_v, case.s_k, d_v, dtype=case.dtype)
        start = end = None
        if case.padded:
            start, end = _padding(source, torch.full((b,), case.s_k, dtype=torch.int32))
            k, v = (poison_absent(x, end, start) for x in (k, v))
            start, end = start.to(device), end.to(device)
        q, k, v = (strided(x, case.memory) for x in (q, k, v))
        shapes = (b, n_q, case.s_q, d_v), (b, n_q, case.s_q)
        options = _options(case, source, start, end)
        return self._call(case, source, reference.attention, (q, k, v), {}, options, shapes)


class FlashAttentionVarlen(_FlashAttention):
    forward = "flash_attention_varlen"

    def make(self, case: FlashCase, seed: int, device: torch.device) -> Call:
        source = Source(seed, device)
        (n_q, n_k, n_v), (d_k, d_v), b = case.heads, case.dims, case.batch
        lengths = [source.integers(0, longest, b) for longest in (case.s_q, case.s_k)]
        for x, longest in zip(lengths, (case.s_q, case.s_k), strict=True):
            x[seed % b] = longest
        cu_q, cu_k = (torch.cat([x.new_zeros(1), x.cumsum(0).int()]) for x in lengths)
        total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
        q = source.normal(n_q, total_q, d_k, dtype=case.dtype)
        k = source.normal(n_k, total_k, d_k, dtype=case.dtype)
        v = source.normal(n_v, total_k, d_v, dtype=case.dtype)
        start = end = None
        if case.padded:
            start, end = _padding(source, lengths[1])
            entry = torch.repeat_interleave(torch.arange(b), lengths[1].long())
            index = torch.arange(total_k) - cu_k[entry]
            absent = ((index < start[entry]) | (index >= end[entry]))[:, None].to(device)
            k, v = k.masked_fill(absent, NAN), v.masked_fill(absent, NAN)
            start, end = start.to(device), end.to(device)
        memory = {"dense": "tokens first", "tokens first": "dense", "gaps": "gaps"}[case.memory]
        q, k, v = (strided(x, memory).transpose(0, 1) for x in (q, k, v))
        cu_q, cu_k = cu_q.to(device), cu_k.to(device)
        packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": case.s_q, "max_seqlen_k": case.s_k}

        def specification(q: Tensor, k: Tensor, v: Tensor, **options: Any):
            return reference.attention_varlen(q, k, v, cu_q, cu_k, **options)

        shapes = (total_q, n_q, d_v), (n_q, total_q)
        options = _options(case, source, start, end)
        return self._call(case, source, specification, (q, k, v), packed, options, shapes)

    def alone(self, call: Call, entry: int):
        rows = {}
        for side in ("q", "k"):
            begin, end = list(pairwise(call.args[f"cu_seqlens_{side}"].tolist()))[entry]
            rows[side] = (begin, end - begin)

        def part(tensors: dict[str, Any]) -> dict[str, Tensor]:
            return {
                name: tensors[name].narrow(dim, *rows[side])
                for side, dims in (("q", _OF_QUERIES), ("k", _OF_KEYS))
                for name, dim in dims.items()
                if tensors.get(name) is not None
            }

        args = call.args | part(call.args)
        for name in ("kv_start", "kv_end"):
            args[name] = None if args[name] is None else args[name][entry : entry + 1]
        for side in ("q", "k"):
            args[f"cu_seqlens_{side}"] = args[f"cu_seqlens_{side}"].new_tensor([0, rows[side][1]])
        for name in ("lse", "dlse"):  # an entry alone has them contiguous by head
            if args.get(name) is not None:
                args[name] = args[name].contiguous()
        return replace(call, args=args), part


# The dimension of the packed tokens.
_OF_QUERIES = {"q": 0, "out": 0, "dout": 0, "dq": 0, "lse": 1, "dlse": 1}
_OF_KEYS = {"k": 0, "v": 0, "dk": 0, "dv": 0}


def _padding(source: Source, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """kv_start and kv_end of each entry; an end may lie after the last key, and some entries have none."""
    b = len(lengths)
    start = (torch.rand(b, generator=source.generator) * 0.4 * lengths).int()
    end = (lengths * (1.2 - torch.rand(b, generator=source.generator) * 0.5)).int()
    if b > 2:
        end[1] = start[1]
    return start, end
