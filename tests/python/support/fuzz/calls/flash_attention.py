"""Calls of flash_attention and flash_attention_varlen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import DTYPES, NAN, Draw, int32, numbers
from ..oracle import Entry, seen
from .base import Circumstances, compare_attention, oracle_options, precision_of, same_bits


def _masks(d: Draw, tokens: list[int]) -> dict[str, Any]:
    """What both training ops take besides tensors."""
    options: dict[str, Any] = {"causal": d.chance(0.5), "window": d.window(), "softmax_scale": d.scale()}
    options["softcap"] = d.softcap()
    for name in ("kv_start", "kv_end"):
        if d.chance(0.3):
            options[name] = int32([d.bound(n) for n in tokens])
    if d.chance(0.2):
        options["dropout_p"] = d.choice(0.1, 0.5, 0.999, d.random.random())
        options["seed"], options["offset"] = d.integer(-(2**63), 2**63 - 1), d.choice(0, 1, 2**32 - 1)
    return options


def _entries(q, k, v, options: dict[str, Any]) -> list[Entry]:
    """Of lists of q `[n_q, s_q, d_k]`, k `[n_k, s_k, d_k]` and v."""

    def entry(e: int) -> Entry:
        s_q, s_k = q[e].shape[1], k[e].shape[1]
        bounds = {
            short: int(options[name][e])
            for name, short in (("kv_start", "start"), ("kv_end", "end"))
            if name in options
        }

        def keys(i: int) -> list[int]:
            return seen(i + s_k - s_q, s_k, causal=options["causal"], window=options["window"], **bounds)

        return Entry(numbers(q[e]), numbers(k[e]), numbers(v[e]), keys, e)

    return [entry(e) for e in range(len(q))]


def _poison(x: Tensor, options: dict[str, Any], entry: int) -> None:
    """NaN in x `[heads, s_k, d]` outside of the span of keys."""
    tokens = x.shape[1]
    start, end = (
        int(options[name][entry]) if name in options else n for name, n in (("kv_start", 0), ("kv_end", tokens))
    )
    for token in range(tokens):
        if not start <= token < end:
            x[:, token] = NAN


def _train(function: Callable, leaves: dict[str, Tensor], grads: tuple[Tensor, Tensor | None] | None):
    """out, lse and the gradients of the leaves that there are."""
    given = {name: x if grads is None else x.detach().requires_grad_() for name, x in leaves.items()}
    out, lse = function(**given)
    results = {"out": out.detach(), "lse": lse.detach()}
    if grads is not None:
        dout, dlse = grads
        outputs, back = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        found = torch.autograd.grad(outputs, list(given.values()), back, allow_unused=True)
        for name, x in zip(given, found, strict=True):
            results[f"d{name}"] = torch.zeros_like(given[name]) if x is None else x
    return results


def _size(d: Draw, rows: int = 500) -> tuple[list[int], tuple[int, int, int], list[int]]:
    """Queries per entry and heads, such that the oracle is done soon."""
    b = d.integer(0, 3) if d.chance(0.2) else d.integer(1, 3)
    lengths = [d.length() for _ in range(b)]
    most = rows // max(1, sum(lengths))
    return lengths, d.heads(min(16, most)), [d.length() for _ in range(b)]


def flash_attention(d: Draw) -> None:
    here = Circumstances(d)
    dtype = d.choice(*DTYPES, torch.float64)
    lengths, heads, tokens = _size(d)
    b, s_q, s_k = len(lengths), max(lengths, default=3), d.length()
    if b and b * heads[0] * s_q > 700:
        b = 1
    (n_q, n_k, n_v), d_k, d_v = heads, d.dim(), d.dim()
    q, k, exact = d.q_and_k((b, n_q, s_q, d_k), (b, n_k, s_k, d_k), dtype)
    v = d.v(b, n_v, s_k, d_v, dtype=dtype)
    options, sinks = _masks(d, [s_k] * b), d.sinks(n_q, dtype)
    entries = _entries(list(q), list(k), list(v), options)
    for e in range(b):
        _poison(k[e], options, e)
        _poison(v[e], options, e)
    d.note(dtype=dtype, q=list(q.shape), k=list(k.shape), v=list(v.shape), sinks=sinks is not None, **options)
    leaves = {name: d.laid_out(x) for name, x in (("q", q), ("k", k), ("v", v))} | (
        {} if sinks is None else {"sinks": sinks}
    )
    grads = None
    if d.chance(0.6):
        dout, dlse = d.tensor(b, n_q, s_q, d_v, dtype=dtype), None
        if d.chance(0.4):
            dlse = d.tensor(b, n_q, s_q, dtype=torch.promote_types(dtype, torch.float32))
        grads = (d.laid_out(dout), dlse)

    def call(rows: slice = slice(None), **given: Tensor) -> dict[str, Tensor]:
        some = {name: x[rows] if isinstance(x, Tensor) else x for name, x in options.items()}

        def function(**tensors: Tensor):
            return diffqkv.flash_attention(return_lse=True, **tensors, **some)

        cut = {name: x if name == "sinks" else x[rows] for name, x in (given or leaves).items()}
        return _train(function, cut, None if grads is None else tuple(None if g is None else g[rows] for g in grads))

    results = here.call(call)
    o = oracle_options(options, d_k, sinks, precision_of(dtype, here.kernels), exact and here.kernels)
    back = {} if grads is None else {"douts": list(numbers(grads[0]))}
    if grads is not None and grads[1] is not None:
        back["dlses"] = list(numbers(grads[1]))
    wanted, dsinks = oracle.attend(entries, o, **back)
    compare_attention(results, lambda name, e: results[name][e], wanted, dsinks)
    here.check_threads(call, results)
    if here.kernels and b > 1 and o.dropped == 0 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: call(slice(e, e + 1))).items():
            if name != "dsinks":
                same_bits(f"{name} of entry {e} alone", x[0], results[name][e])


def flash_attention_varlen(d: Draw) -> None:
    here = Circumstances(d)
    dtype = d.choice(*DTYPES, torch.float64)
    lengths, heads, tokens = _size(d)
    (n_q, n_k, n_v), d_k, d_v, b = heads, d.dim(), d.dim(), len(lengths)
    starts_q, starts_k = ([sum(n[:e]) for e in range(b + 1)] for n in (lengths, tokens))
    total_q, total_k = sum(lengths), sum(tokens)
    q, k, exact = d.q_and_k((total_q, n_q, d_k), (total_k, n_k, d_k), dtype)
    v = d.v(total_k, n_v, d_v, dtype=dtype)
    options, sinks = _masks(d, tokens), d.sinks(n_q, dtype)

    def split(x: Tensor, starts: list[int]) -> list[Tensor]:
        return [x[a:z].transpose(0, 1) for a, z in zip(starts, starts[1:], strict=False)]

    entries = _entries(split(q, starts_q), split(k, starts_k), split(v, starts_k), options)
    for x in (k, v):
        for e, rows in enumerate(split(x, starts_k)):
            _poison(rows, options, e)
    d.note(dtype=dtype, q=list(q.shape), k=list(k.shape), v=list(v.shape), sinks=sinks is not None, **options)
    leaves = {name: d.laid_out(x) for name, x in (("q", q), ("k", k), ("v", v))} | (
        {} if sinks is None else {"sinks": sinks}
    )
    grads = None
    if d.chance(0.6):
        dout, dlse = d.tensor(total_q, n_q, d_v, dtype=dtype), None
        if d.chance(0.4):
            dlse = d.tensor(n_q, total_q, dtype=torch.promote_types(dtype, torch.float32))
        grads = (d.laid_out(dout), dlse)
    longest = [max(n, default=0) + d.choice(0, 0, 1, 50) for n in (lengths, tokens)]

    def call() -> dict[str, Tensor]:
        cu = (int32(starts_q), int32(starts_k))

        def function(q, k, v, sinks=None):
            return diffqkv.flash_attention_varlen(q, k, v, *cu, *longest, sinks=sinks, return_lse=True, **options)

        return _train(function, leaves, grads)

    def alone(e: int) -> dict[str, Tensor]:
        rows_q, rows_k = (slice(s[e], s[e + 1]) for s in (starts_q, starts_k))
        cu = (int32([0, lengths[e]]), int32([0, tokens[e]]))
        some = {name: x[e : e + 1] if isinstance(x, Tensor) else x for name, x in options.items()}

        def function(q, k, v, sinks=None):
            return diffqkv.flash_attention_varlen(q, k, v, *cu, *longest, sinks=sinks, return_lse=True, **some)

        cut = {n: x if n == "sinks" else x[rows_q if n == "q" else rows_k] for n, x in leaves.items()}
        back = None if grads is None else (grads[0][rows_q], None if grads[1] is None else grads[1][:, rows_q])
        return _train(function, cut, back)

    def part(results: dict[str, Tensor], name: str, e: int) -> Tensor:
        if name == "lse":
            return results[name][:, starts_q[e] : starts_q[e + 1]]
        starts = starts_q if name in ("out", "dq") else starts_k
        return results[name][starts[e] : starts[e + 1]].transpose(0, 1)

    results = here.call(call)
    o = oracle_options(options, d_k, sinks, precision_of(dtype, here.kernels), exact and here.kernels)
    back = {} if grads is None else {"douts": [numbers(x) for x in split(grads[0], starts_q)]}
    if grads is not None and grads[1] is not None:
        back["dlses"] = [numbers(grads[1][:, a:z]) for a, z in zip(starts_q, starts_q[1:], strict=False)]
    wanted, dsinks = oracle.attend(entries, o, **back)
    compare_attention(results, lambda name, e: part(results, name, e), wanted, dsinks)
    here.check_threads(call, results)
    if here.kernels and b > 1 and o.dropped == 0 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: alone(e)).items():
            if name != "dsinks":
                x = x if name == "lse" else x.transpose(0, 1)
                same_bits(f"{name} of entry {e} alone", x, part(results, name, e))
