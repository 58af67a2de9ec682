"""One random call of each op: its arguments, what it must return, and the same call in other circumstances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import diffqkv
from diffqkv.ops import dispatch

from . import bad, oracle
from .draw import DTYPES, NAN, UNMAPPED, Draw, int32, numbers
from .oracle import PRECISION, Entry, Options, Result, seen

MAX_ADDED = 4  # selective_v_attention with max_error adds rows up to that many times top_k


class Mismatch(AssertionError):
    """A result that is not what the documentation says."""


def check(holds: bool, text: str) -> None:
    if not holds:
        raise Mismatch(text)


def close(name: str, actual: Tensor, exact: np.ndarray, allowed: np.ndarray) -> None:
    check(tuple(actual.shape) == exact.shape, f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}")
    got, largest = numbers(actual), PRECISION[actual.dtype].largest
    with np.errstate(invalid="ignore", over="ignore"):
        may_overflow = np.abs(exact) + allowed >= largest  # an infinity or a number, as it comes
        # What is summed up may be infinite of both signs, or infinite times 0.
        may_be_nan = ~(allowed < max(largest, PRECISION[torch.float32].largest))
        errors = np.abs(got - exact)
        right = (errors <= allowed) | (got == exact) | (np.isnan(got) & np.isnan(exact))
    wrong = ~(right | (may_overflow & ~np.isnan(exact) & ~np.isnan(got)) | may_be_nan)
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(errors / np.maximum(allowed, 1e-300), nan=np.inf), -1)
        at = np.unravel_index(excess.argmax(), exact.shape)
        place = [int(n) for n in at]
        raise Mismatch(
            f"{name}{place}: got {got[at]:.9g}, want {exact[at]:.9g} within {allowed[at]:.3g} "
            f"({wrong.sum()} of {wrong.size} elements are wrong)"
        )


def same_bits(name: str, a: Tensor, b: Tensor) -> None:
    check(
        a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}"
    )
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    check(torch.equal(a, b), f"{name}: other bits")


class Circumstances:
    """Whether a call goes to the kernels or to plain torch, and on how many threads."""

    def __init__(self, d: Draw):
        self.kernels = d.chance(0.85)
        self.threads = d.integer(1, 4)
        self.others = d.integer(1, 4) if self.kernels and d.chance(0.3) else None
        d.note(path="kernels" if self.kernels else "plain torch", threads=self.threads)

    def call(self, function: Callable, threads: int | None = None) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or self.threads)
        try:
            if self.kernels:
                return function()
            with mock.patch.object(dispatch, "uses_kernel", lambda *args, **options: False):
                return function()
        finally:
            torch.set_num_threads(before)

    def check_threads(self, function: Callable[[], dict[str, Tensor]], first: dict[str, Tensor]) -> None:
        if self.others is not None:
            for name, x in self.call(function, self.others).items():
                same_bits(f"{name} on {self.others} threads instead of {self.threads}", x, first[name])


def precision_of(dtype: torch.dtype, kernels: bool) -> oracle.Precision:
    """Plain torch rounds more often on its way: scores and each head's share of a gradient."""
    p = PRECISION[dtype]
    if kernels:
        return p
    factor = 1 if dtype in (torch.float32, torch.float64) else 4
    return oracle.Precision(
        4 * p.sums, factor * max(p.weights, p.results), factor * p.results, factor * p.least, p.largest, 4 * p.sums
    )


# ---- flash_attention -------------------------------------------------------------------------------------------------


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


def _oracle_options(
    options: dict[str, Any], d_k: int, sinks: Tensor | None, p: oracle.Precision, exact: bool
) -> Options:
    scale = options.get("softmax_scale")
    return Options(
        precision=p,
        scale=d_k**-0.5 if scale is None else scale,
        exact_scores=exact,
        softcap=options.get("softcap", 0.0),
        sinks=None if sinks is None else numbers(sinks),
        dropped=min(65535, math.floor(options.get("dropout_p", 0.0) * 65536 + 0.5)),
        seed=options.get("seed", 0),
        offset=options.get("offset", 0),
    )


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
    o = _oracle_options(options, d_k, sinks, precision_of(dtype, here.kernels), exact and here.kernels)
    back = {} if grads is None else {"douts": list(numbers(grads[0]))}
    if grads is not None and grads[1] is not None:
        back["dlses"] = list(numbers(grads[1]))
    wanted, dsinks = oracle.attend(entries, o, **back)
    _compare_attention(results, lambda name, e: results[name][e], wanted, dsinks)
    here.check_threads(call, results)
    if here.kernels and b > 1 and o.dropped == 0 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: call(slice(e, e + 1))).items():
            if name != "dsinks":
                same_bits(f"{name} of entry {e} alone", x[0], results[name][e])


def _compare_attention(results: dict[str, Tensor], part: Callable, wanted: list[Result], dsinks: Result) -> None:
    for e, result in enumerate(wanted):
        for name, exact in result.values.items():
            close(f"{name} of entry {e}", part(name, e), exact, result.allowed[name])
    if "dsinks" in results:
        x = results["dsinks"]
        allowed = dsinks.allowed["dsinks"] + PRECISION[x.dtype].results * np.abs(dsinks.values["dsinks"]) + 1e-30
        if x.dtype == torch.float16:
            allowed = allowed + 2**-25
        close("dsinks", x, dsinks.values["dsinks"], allowed)


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
    o = _oracle_options(options, d_k, sinks, precision_of(dtype, here.kernels), exact and here.kernels)
    back = {} if grads is None else {"douts": [numbers(x) for x in split(grads[0], starts_q)]}
    if grads is not None and grads[1] is not None:
        back["dlses"] = [numbers(grads[1][:, a:z]) for a, z in zip(starts_q, starts_q[1:], strict=False)]
    wanted, dsinks = oracle.attend(entries, o, **back)
    _compare_attention(results, lambda name, e: part(results, name, e), wanted, dsinks)
    here.check_threads(call, results)
    if here.kernels and b > 1 and o.dropped == 0 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: alone(e)).items():
            if name != "dsinks":
                x = x if name == "lse" else x.transpose(0, 1)
                same_bits(f"{name} of entry {e} alone", x, part(results, name, e))


# ---- caches ----------------------------------------------------------------------------------------------------------


class Store:
    """A cache's memory. Where a token lies is told by `place`; everything that holds no token is NaN."""

    def __init__(
        self, d: Draw, tokens: list[int], starts: list[int], heads: tuple[int, int, int], dims, dtype, room: int = 0
    ):
        _, self.n_k, self.n_v = heads
        self.d_k, self.d_v = dims
        self.dtype, self.groups = dtype, math.gcd(self.n_k, self.n_v)
        self.layout = d.choice("rows", "panels")
        self.paged = d.chance(0.5)
        b, longest = len(tokens), max(tokens, default=0) + room
        self.table: list[list[int]] | None = None
        if self.paged:
            self.page_size = d.choice(32, 64, 96) if self.layout == "panels" else d.choice(1, 7, 16, 32, 33, 64)
            self.columns = columns = -(-longest // self.page_size) + d.choice(0, 0, 1, 3)
            pages = b * columns + d.integer(1, 5)
            self.table = [[d.random.choice(UNMAPPED) for _ in range(columns)] for _ in range(b)]
            free = list(range(pages))
            d.random.shuffle(free)
            for e, row in enumerate(self.table):
                for column in range(columns):
                    first = column * self.page_size
                    if first < tokens[e] + room and first + self.page_size > starts[e]:
                        row[column] = free.pop()
            self.capacity = columns * self.page_size
        else:
            pages, self.page_size = b, longest + d.choice(0, 0, 1, 32)
            self.capacity = self.page_size
        k_shape = self.k_shape(pages)
        inner = 1 if self.layout == "rows" else len(k_shape) - 3
        self.k = d.laid_out(torch.full(k_shape, NAN, dtype=dtype), inner)
        self.v = d.laid_out(
            torch.full((pages, self.groups, self.page_size, self.n_v // self.groups, self.d_v), NAN, dtype=dtype)
        )

    def k_shape(self, pages: int) -> tuple[int, ...]:
        if self.layout == "rows":
            return pages, self.groups, self.page_size, self.n_k // self.groups, self.d_k
        panels = -(-self.page_size // 32)
        if self.dtype == torch.bfloat16:
            return pages, self.n_k, panels, self.d_k // 2, 32, 2
        return pages, self.n_k, panels, self.d_k, 32

    def place(self, entry: int, position: int) -> tuple[int, int]:
        """Page and slot."""
        if self.table is None:
            return entry, position
        return self.table[entry][position // self.page_size], position % self.page_size

    def k_row(self, k: Tensor, entry: int, position: int) -> Tensor:
        """The view of `[n_k, d_k]` numbers, in other shapes."""
        page, slot = self.place(entry, position)
        if self.layout == "rows":
            return k[page, :, slot]
        return k[page, :, slot // 32, :, slot % 32]

    def v_row(self, v: Tensor, entry: int, position: int) -> Tensor:
        page, slot = self.place(entry, position)
        return v[page, :, slot]

    def write(self, entry: int, position: int, k: Tensor, v: Tensor) -> None:
        for row, x in ((self.k_row(self.k, entry, position), k), (self.v_row(self.v, entry, position), v)):
            row.copy_(x.reshape(row.shape))

    def options(self, rows: slice = slice(None)) -> dict[str, Any]:
        table = (
            None
            if self.table is None
            else torch.tensor(self.table, dtype=torch.int32).view(len(self.table), self.columns)[rows]
        )
        return {"block_table": table, "k_layout": self.layout}


class Filled:
    """Arguments that decode_attention and selective_v_attention share, and the entries for the oracle."""

    def __init__(self, d: Draw, exact: bool = False, window: bool = True):
        self.dtype = d.choice(*DTYPES)
        long = d.chance(0.15)
        b = 1 if long else d.integer(0, 3) if d.chance(0.1) else d.integer(1, 3)
        self.s_q = d.choice(1, 1, 1, 2, d.integer(0, 20))
        heads = d.heads(4 if long else max(1, min(16, 500 // max(1, b * self.s_q))))
        self.n_q, self.n_k, self.n_v = heads
        self.d_k, self.d_v = d.dim(), d.dim()
        self.lengths = [d.integer(300, 1600) if long else d.length() for _ in range(b)]
        starts = [0] * b
        self.start: Tensor | None = None
        if d.chance(0.4):
            starts = [d.integer(0, n + 3) if d.chance(0.5) else d.integer(0, max(0, n - 1)) for n in self.lengths]
            self.start = int32(starts)
        self.store = s = Store(d, self.lengths, starts, heads, (self.d_k, self.d_v), self.dtype)
        most = max(self.lengths, default=0)
        q, k, self.exact = d.q_and_k((b, self.n_q, self.s_q, self.d_k), (b, self.n_k, most, self.d_k), self.dtype)
        if exact and not self.exact:
            q, k, self.exact = q.round().clamp(-2, 2), k.round().clamp(-2, 2), True
        v = d.v(b, self.n_v, most, self.d_v, dtype=self.dtype)
        self.starts, self.k, self.v = starts, numbers(k), numbers(v)
        for e, n in enumerate(self.lengths):
            for t in range(starts[e], n):
                s.write(e, t, k[e, :, t], v[e, :, t])
        d.note(dtype=self.dtype, q=list(q.shape), k=list(s.k.shape), v=list(s.v.shape), layout=s.layout, paged=s.paged)
        d.note(cache_seqlens=self.lengths, cache_start=starts)
        self.q, self.window = d.laid_out(q), d.window() if window else (-1, -1)

    def tensors(self, rows: slice = slice(None)) -> dict[str, Any]:
        cut = slice(None) if self.store.paged else rows
        start = None if self.start is None else self.start[rows]
        lengths = int32(self.lengths)[rows]
        caches = {"k_cache": self.store.k[cut], "v_cache": self.store.v[cut]}
        return {"q": self.q[rows], **caches, "cache_seqlens": lengths, "cache_start": start, **self.store.options(rows)}

    def keys(self, e: int, query: int) -> list[int]:
        n = self.lengths[e]
        return seen(query + n - self.s_q, n, causal=True, window=self.window, start=self.starts[e])

    def entries(self) -> list[Entry]:
        def entry(e: int) -> Entry:
            n = self.lengths[e]
            return Entry(numbers(self.q[e]), self.k[e, :, :n], self.v[e, :, :n], lambda query: self.keys(e, query))

        return [entry(e) for e in range(len(self.lengths))]


def decode_attention(d: Draw) -> None:
    here, f = Circumstances(d), Filled(d)
    options = {"window": f.window, "softmax_scale": d.scale(), "softcap": d.softcap(), "sinks": d.sinks(f.n_q, f.dtype)}

    d.note(**options)

    def call(rows: slice = slice(None)) -> dict[str, Tensor]:
        out, lse = diffqkv.decode_attention(**f.tensors(rows), **options, return_lse=True)
        return {"out": out, "lse": lse}

    results = here.call(call)
    p = precision_of(f.dtype, here.kernels)
    wanted, _ = oracle.attend(
        f.entries(), _oracle_options(options, f.d_k, options["sinks"], p, f.exact and here.kernels)
    )
    _compare_attention(results, lambda name, e: results[name][e], wanted, Result())
    here.check_threads(call, results)
    _check_alone(d, here, call, results, len(f.lengths))


def _check_alone(d: Draw, here: Circumstances, call: Callable, results: dict[str, Tensor], b: int) -> None:
    if here.kernels and b > 1 and d.chance(0.3):
        e = d.integer(0, b - 1)
        for name, x in here.call(lambda: call(slice(e, e + 1))).items():
            same_bits(f"{name} of entry {e} alone", x[0], results[name][e])


def selective_v_attention(d: Draw) -> None:
    here, f = Circumstances(d), Filled(d, exact=d.chance(0.6), window=False)
    longest = max(f.lengths, default=0)
    top_k = d.choice(1, 2, d.integer(1, 40), d.integer(1, 2 * longest + 1), longest + d.integer(1, 50))
    options: dict[str, Any] = {"top_k": top_k, "tail": d.choice("drop", "renorm", "mean"), "softmax_scale": d.scale()}
    if d.chance(0.4):
        options["max_error"] = d.choice(0.0, 1e30, 10 ** d.random.uniform(-5, 2))
    for name in ("keep_first", "keep_last"):
        options[name] = d.choice(0, 0, 1, d.integer(0, 40), 10**6)
    if d.chance(0.4):
        stats = np.zeros((len(f.lengths), f.n_v, f.d_v + 1), dtype=np.float32)
        for e, n in enumerate(f.lengths):
            rows = f.v[e, :, f.starts[e] : n]
            stats[e, :, :-1], stats[e, :, -1] = rows.sum(1), np.linalg.norm(rows, axis=-1).max(-1, initial=0)
        options["v_stats"] = torch.from_numpy(stats)

    d.note(**{name: x for name, x in options.items() if name != "v_stats"}, v_stats="v_stats" in options)

    def call(rows: slice = slice(None), stats: bool = True) -> dict[str, Tensor]:
        some = {name: x[rows] if isinstance(x, Tensor) else x for name, x in options.items()}
        out = diffqkv.selective_v_attention(**f.tensors(rows), **some, return_stats=stats)
        return {"out": out[0], **out[1]._asdict()} if stats else {"out": out}

    results = here.call(call)
    o = _oracle_options(options, f.d_k, None, precision_of(f.dtype, here.kernels), f.exact)
    for e, entry in enumerate(f.entries()):
        for query in range(f.s_q):
            keys = entry.keys(query)
            for head in range(f.n_q):
                row = {name: x[e, head, query] for name, x in results.items()}
                text = f"entry {e}, head {head}, query {query}: "
                _check_selective_row(text, row, entry, f.starts[e], head, query, keys, options, o, here.kernels)
    if top_k > longest and d.chance(0.5):
        options["top_k"] = d.choice(10**7, 2**31, 2**40, 2**62)  # the same rows, and nothing to list them in
    same_bits("out without return_stats", here.call(lambda: call(stats=False))["out"], results["out"])
    options["top_k"] = top_k
    here.check_threads(call, results)
    _check_alone(d, here, call, results, len(f.lengths))


def _check_selective_row(text, got, entry, start, head, query, keys, options, o, kernels) -> None:
    p, n, n_q, top_k = o.precision, len(keys), len(entry.q), options["top_k"]
    at = np.array(keys, dtype=np.int64)
    q, k_head, v_head = entry.q[head, query], head * len(entry.k) // n_q, head * len(entry.v) // n_q
    k, v = entry.k[k_head, at], entry.v[v_head, at]
    listed = [int(key) for key in got["indices"]]
    if n == 0:
        check(all(key == -1 for key in listed), f"{text}indices {listed[:5]} of a query that sees nothing")
        for name, want in (
            ("out", 0.0),
            ("lse", -math.inf),
            ("kept_mass", 0.0),
            ("rows_used", 0),
            ("error_bound", 0.0),
        ):
            check(bool((got[name] == want).all()), f"{text}{name}: got {got[name].flatten()[0]}, want {want}")
        return
    count = min(top_k, n)
    best = listed[:count]
    check(
        len(listed) == top_k and set(listed[count:]) <= {-1}, f"{text}indices: not -1 behind the {count} rows there are"
    )
    products = k @ q
    score = dict(zip(keys, products, strict=True))
    order = oracle.best_first(products, keys, o.scale)
    if o.exact_scores:
        want = sorted(order[:count])
        check(best == want, f"{text}indices: got {best[:8]}, want {want[:8]}")
    else:
        check(
            best == sorted(set(best)) and set(best) <= set(keys), f"{text}indices {best[:8]}: not ascending or not seen"
        )
        sign, unclear = -1 if o.scale < 0 else 1, p.sums * (8 + len(q) / 2) * (np.abs(k) @ np.abs(q)).max() + 1e-37
        worst = min(sign * score[key] for key in best)
        left = max((sign * score[key] for key in keys if key not in set(best)), default=-math.inf)
        check(worst >= left - unclear, f"{text}indices: a row of score {worst:.9g} is listed, one of {left:.9g} is not")

    row = oracle.softmax(q, k, None, o)
    close(f"{text}lse", got["lse"], np.array(row.lse), np.array(row.lse_error))
    weight, error = (dict(zip(keys, x, strict=True)) for x in (row.weights, row.errors))
    forced = set(keys[: options["keep_first"]]) | set(keys[max(0, n - options["keep_last"]) :])
    used, rows_used = set(best) | forced, int(got["rows_used"])

    # What an error bound is made of, as an interval: the largest norm is of the visible rows or of all cached ones.
    norms = np.linalg.norm(entry.v[v_head, start:], axis=-1).max()
    radius = [np.linalg.norm(v, axis=-1).max(), norms]
    mean, mean_error = v.mean(0), p.sums * 16 * np.abs(entry.v[v_head, start:]).sum(0) / n
    if options["tail"] == "mean":
        radius = [r + np.linalg.norm(mean) for r in radius]

    def discarded(rows: set[int]) -> tuple[float, float]:
        """The mass of the other rows, and its error."""
        rest = [key for key in keys if key not in rows]
        if not rest:
            return 0.0, 0.0
        error_of_mass = min(math.fsum(error[key] for key in rows), math.fsum(error[key] for key in rest))
        return math.fsum(weight[key] for key in rest), error_of_mass + p.sums * (8 + n / 4)

    if "max_error" in options:
        limit, twice = options["max_error"], 2 if options["tail"] == "renorm" else 1
        possible = []
        for more in range(count, n + 1):
            rows = used | set(order[:more])
            mass, mass_error = discarded(rows)
            if more > MAX_ADDED * top_k or len(rows) == n:
                possible.append(set(keys))
                break
            low, high = (mass - mass_error) * radius[0], (mass + mass_error + 2**-18) * radius[1] * twice
            if low <= limit * 1.001 + 1e-30:
                possible.append(rows)
            if high * 1.001 < limit:
                break
        fitting = [rows for rows in possible if len(rows) == rows_used]
        sizes = [len(rows) for rows in possible]
        if o.exact_scores:
            check(bool(fitting), f"{text}rows_used: got {rows_used}, want one of {sizes[:3]}...{sizes[-3:]}")
            used = fitting[0]
        else:
            check(len(used) <= rows_used <= n, f"{text}rows_used: got {rows_used}, want {len(used)} to {n}")
    else:
        check(rows_used == len(used), f"{text}rows_used: got {rows_used}, want {len(used)}")

    dense = row.weights @ v
    long = p.weights + p.sums * (4 + n / 4)
    dense_error = row.errors @ np.abs(v) + long * (row.weights @ np.abs(v)) + p.results * np.abs(dense) + p.least
    if "max_error" in options and (o.exact_scores or rows_used == n):
        distance = np.linalg.norm(numbers(got["out"]) - dense)
        allowed = (options["max_error"] if rows_used < n else 0) + np.linalg.norm(dense_error)
        check(distance <= allowed, f"{text}out: {distance:.6g} from dense attention, want at most {allowed:.6g}")
    if "max_error" in options and not o.exact_scores and rows_used != len(used):
        return  # which rows were added is told by nothing

    mass, mass_error = discarded(used)
    inside = np.array([key in used for key in keys])
    kept = np.array(1.0 - mass)
    close(f"{text}kept_mass", got["kept_mass"], kept, np.array(mass_error + (p.sums * 4 if len(used) < n else 0)))
    if options["tail"] == "renorm":
        alone = oracle.softmax(q, k[inside], None, o)
        out = alone.weights @ v[inside]
        out_error = alone.errors @ np.abs(v[inside]) + 4 * long * (alone.weights @ np.abs(v[inside]))
    else:
        out = row.weights[inside] @ v[inside]
        out_error = row.errors[inside] @ np.abs(v[inside]) + long * (row.weights[inside] @ np.abs(v[inside]))
        if options["tail"] == "mean":
            out = out + mass * mean
            out_error = out_error + mass_error * np.abs(mean) + (mass + mass_error) * mean_error
    out_error = out_error + p.results * np.abs(out) + p.least
    close(f"{text}out", got["out"], out, out_error)

    bound = float(got["error_bound"])
    if options["tail"] == "renorm":
        radius = [r + np.linalg.norm(out) for r in radius]
    high = (mass + mass_error + (2**-18 if kernels and len(used) < n else 0)) * (
        radius[1] + np.linalg.norm(out_error) + np.linalg.norm(mean_error)
    )
    check(bound <= high * 1.001 + 1e-35, f"{text}error_bound: got {bound:.6g}, want at most {high:.6g}")
    low = max((mass - mass_error) * radius[0] * 0.999, np.linalg.norm(out - dense) * 0.999 - mass_error * radius[1] * 2)
    check(bound >= low - 1e-30, f"{text}error_bound: got {bound:.6g}, want at least {low:.6g}")


# ---- kv_cache_update -------------------------------------------------------------------------------------------------


def _twin(x: Tensor) -> Tensor:
    """x and the memory around it, once more."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


def _memory(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def kv_cache_update(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    b = d.integer(0, 4)
    heads, dims = d.heads(24), (d.dim(), d.dim())
    ends = [d.length(150) for _ in range(b)]
    firsts = [d.integer(0, n) if d.chance(0.5) else 0 for n in ends]
    s = Store(d, ends, firsts, heads, dims, dtype)
    if d.chance(0.7):
        s.k.copy_(d.tensor(*s.k.shape, dtype=dtype))
        s.v.copy_(d.tensor(*s.v.shape, dtype=dtype))
    s_new = d.choice(1, 1, d.length(40))
    slots = []
    for first, end in zip(firsts, ends, strict=True):
        row = d.random.sample(range(first, end), min(s_new, end - first))
        row = [-1 if d.chance(0.15) else n for n in row] + [-1] * (s_new - len(row))
        if d.chance(0.5):
            row.sort()
        slots.append(row)
    positions = torch.tensor(slots, dtype=d.choice(torch.int32, torch.int64)).view(b, s_new)
    if d.chance(0.3):
        positions = positions.T.contiguous().T
    k, v = (d.laid_out(d.tensor(b, n, s_new, size, dtype=dtype)) for n, size in zip(heads[1:], dims, strict=True))
    rotation: dict[str, Tensor] = {}
    if d.chance(0.5):
        d_rot = 2 * d.integer(0, dims[0] // 2) if d.chance(0.5) else dims[0]
        rows, kind = d.choice(1, b), d.choice(torch.float32, dtype)
        angles = d.tensor(rows, s_new, d_rot // 2, size=10.0).double()
        both = torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 1, 2)
        if d.chance(0.2):
            both = d.tensor(*both.shape).double()
        both = d.laid_out(both.to(kind))
        rotation = {"cos": both[0], "sin": both[1]}
    stats = d.tensor(b, heads[2], dims[1] + 1).abs() if d.chance(0.4) else None
    d.note(dtype=dtype, k=list(k.shape), v=list(v.shape), k_cache=list(s.k.shape), layout=s.layout, paged=s.paged)
    d.note(positions=slots, rotation=[list(x.shape) for x in rotation.values()], v_stats=stats is not None)
    written = {"k_cache": s.k, "v_cache": s.v} | ({} if stats is None else {"v_stats": stats})
    before = {name: _twin(x) for name, x in written.items()}

    def call(into: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
        cut = {name: x if s.paged and name != "v_stats" else x[rows] for name, x in into.items()}
        turn = {name: x[rows] if len(x) == b else x for name, x in rotation.items()}
        result = diffqkv.kv_cache_update(
            k=k[rows], v=v[rows], positions=positions[rows], **cut, **turn, **s.options(rows)
        )
        check(result is None, "returns something")
        return {name: _memory(x) for name, x in into.items()}

    given = {name: _twin(x) for name, x in {"k": k, "v": v, "positions": positions, **rotation}.items()}
    actual = here.call(lambda: call(written))
    actual = {name: x.clone() for name, x in actual.items()}
    for name, x in {"k": k, "v": v, "positions": positions, **rotation}.items():
        same_bits(f"{name}, which is only read", _memory(x), _memory(given[name]))
    if stats is not None:
        _check_stats(stats, before["v_stats"], v, slots)
    p, wanted = PRECISION[dtype], {}
    for e, row in enumerate(slots):
        for t, position in enumerate(row):
            if position != -1:
                wanted[e, position] = (k[e, :, t], v[e, :, t], t)
    for (e, position), (k_new, v_new, t) in wanted.items():
        k_row, v_row = s.k_row(s.k, e, position), s.v_row(s.v, e, position)
        same_bits(f"v_cache at {e}, {position}", v_row.reshape(v_new.shape), v_new)
        if rotation:
            rows = [numbers(x[e % len(x), t]) for x in (rotation["cos"], rotation["sin"])]
            exact, size = oracle.rotated(numbers(k_new), *rows)
            error = 4 * p.sums * size + p.results * np.abs(exact) + p.least
            error[:, len(rows[0]) :] = 0
            close(f"k_cache at {e}, {position}", k_row.reshape(k_new.shape), exact, error)
        else:
            same_bits(f"k_cache at {e}, {position}", k_row.reshape(k_new.shape), k_new)
        k_row.copy_(s.k_row(before["k_cache"], e, position))
        v_row.copy_(s.v_row(before["v_cache"], e, position))
    for name in ("k_cache", "v_cache"):
        same_bits(f"{name} beside the tokens", _memory(written[name]), _memory(before[name]))
    here.check_threads(lambda: call({name: _twin(x) for name, x in before.items()}), actual)
    if b > 1 and here.kernels and d.chance(0.3):
        again = {name: _twin(x) for name, x in before.items()}
        for e in range(b):
            here.call(lambda rows=slice(e, e + 1): call(again, rows))
        for name, x in again.items():
            same_bits(f"{name} written entry by entry", _memory(x), actual[name])


def _check_stats(stats: Tensor, before: Tensor, v: Tensor, slots: list[list[int]]) -> None:
    exact, size = numbers(before).copy(), np.abs(numbers(before))
    for e, row in enumerate(slots):
        for t, position in enumerate(row):
            if position != -1:
                x = numbers(v[e, :, t])
                exact[e, :, :-1] += x
                size[e, :, :-1] += np.abs(x)
                exact[e, :, -1] = np.maximum(exact[e, :, -1], np.linalg.norm(x, axis=-1))
    size[..., -1] = exact[..., -1]
    close("v_stats", stats, exact, 2**-24 * (8 + max(v.shape[2], v.shape[3]) / 4) * size + 1e-34)


# ---- swiglu ----------------------------------------------------------------------------------------------------------


def swiglu(d: Draw) -> None:
    here, dtype = Circumstances(d), d.choice(*DTYPES)
    shape = [d.length(40) if d.chance(0.5) else d.integer(1, 9) for _ in range(d.integer(0, 4))]
    while math.prod(shape) > 5000:
        shape[shape.index(max(shape))] //= 2
    largest = math.log10(PRECISION[dtype].largest)

    def values(most: float) -> Tensor:
        """Of all magnitudes up to 10^most, or about 1, some of them special."""
        x = d.tensor(*shape).double()
        if d.chance(0.5):
            x = x.sign() * 10 ** (torch.special.ndtr(d.tensor(*shape).double()) * (most + 3) - 3)
        specials = (0.0, -0.0, 1e-40, math.inf, -math.inf, NAN)
        special = d.tensor(*shape) > d.choice(2.5, 10)
        x = torch.where(special, torch.tensor(d.choice(*specials), dtype=x.dtype), x)
        x = x.clamp(-PRECISION[dtype].largest, PRECISION[dtype].largest).to(dtype) if most > 30 else x.to(dtype)
        return _any_strides(d, x)

    d.note(dtype=dtype, shape=shape)
    gate, up, dout = values(largest), values(d.choice(2, 15)), values(d.choice(2, 15))

    def call() -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        out = diffqkv.swiglu(*leaves)
        dgate, dup = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), "dgate": dgate, "dup": dup}

    results = here.call(call)
    wanted = Result()
    for name in results:
        wanted.zeros(name, tuple(shape))
    p = PRECISION[dtype]
    with np.errstate(all="ignore"):
        for at in np.ndindex(*shape):
            x, u, g = (float(t[at]) for t in (gate, up, dout))
            s = oracle.sigmoid(x)
            silu, rest = x * s, oracle.sigmoid(-x)
            slope = s + silu * rest
            # float32 has no sigmoid below 2^-126: what is lost there, before the other factors, is below `least`.
            least, lost = 1e-36, abs(silu) < 1e-30 or x == -math.inf
            relative = p.sums * (16 + 2 * min(abs(x), 100)) + p.results
            grown = abs(g * u) * (s + abs(silu) * rest)
            for name, exact, size, floor, anything in (
                ("out", silu * u, abs(silu * u), abs(u), lost and math.isinf(u)),
                ("dup", silu * g, abs(silu * g), abs(g), lost and math.isinf(g)),
                ("dgate", g * u * slope, grown, abs(g * u) + abs(g) + abs(u), abs(g * u) > 1e37 or math.isinf(x)),
            ):
                unknown = anything and not any(map(math.isnan, (x, u, g)))
                wanted.values[name][at] = exact
                wanted.allowed[name][at] = math.inf if unknown else relative * size + least * floor + p.least
    for name, x in results.items():
        close(name, x, wanted.values[name], wanted.allowed[name])
    here.check_threads(call, results)


def _any_strides(d: Draw, x: Tensor) -> Tensor:
    """The last dimension may have any stride, too."""
    if x.dim() < 2 or d.chance(0.5):
        return d.laid_out(x) if x.dim() else x
    order = list(range(x.dim()))
    d.random.shuffle(order)
    back = [order.index(n) for n in range(x.dim())]
    return d.laid_out(x.permute(order)).permute(back)


# ---- all -------------------------------------------------------------------------------------------------------------

OPS: dict[str, Callable[[Draw], None]] = {
    "flash_attention": flash_attention,
    "flash_attention_varlen": flash_attention_varlen,
    "decode_attention": decode_attention,
    "kv_cache_update": kv_cache_update,
    "selective_v_attention": selective_v_attention,
    "swiglu": swiglu,
}
BAD_SHARE = 0.15


def run(op: str, seed: int) -> None:
    """The call that seed makes; raises what is wrong with it."""
    d = Draw(op, seed)
    try:
        (bad.CALLS if d.chance(BAD_SHARE) else OPS)[op](d)
    except Exception as error:
        error.add_note("the call: " + ", ".join(d.notes))
        raise
