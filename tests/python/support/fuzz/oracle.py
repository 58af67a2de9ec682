"""What the ops compute, row by row in float64, and how far a result may be from it.

Written from the documentation alone: nothing here comes from `diffqkv.reference`, so that an error there is found, too.
The keys a query sees are a list made with Python's integers, which have no end; gradients are written out.

Every value comes with the largest error that arithmetic in the op's precision can explain: rounded dot products move
each score by at most `shift`, a softmax weight then lies between two bounds, and sums of such weights have the sum of
their widths. Dot products that are exact in float32 shift nothing, however large they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Array = np.ndarray
FLOAT32, FLOAT64 = torch.finfo(torch.float32), torch.finfo(torch.float64)


@dataclass(frozen=True)
class Precision:
    sums: float  # relative error of a rounded sum or product
    weights: float  # of a softmax weight, or of its gradient, before it is multiplied by V, K or Q
    results: float  # of a result in the tensor's dtype
    least: float  # absolute: what is too small for the dtype or flushed to 0
    largest: float
    # Of lse, where weights are not sums' shares but exponentials of a difference to it; the backward pass then computes
    # the scores in another order, too.
    lse: float = 0.0
    on_the_way: float = FLOAT32.max  # the largest number that is multiplied by V, K or Q

    def rounded(self, x: Array, error: Array) -> Array:
        """The error of x before it is multiplied by V, K or Q; infinite where x may be."""
        most = np.abs(x) + error
        return np.where(most < self.on_the_way, error + self.weights * most + self.least * (most != 0), np.inf)


PRECISION = {
    # The oracle rounds as much itself.
    torch.float64: Precision(2**-52, 2**-51, 2**-52, 1e-290, FLOAT64.max, on_the_way=FLOAT64.max),
    torch.float32: Precision(2**-24, 0.0, 2**-24, 1e-34, FLOAT32.max),
    torch.bfloat16: Precision(2**-24, 2**-8, 2**-8, 1e-34, torch.finfo(torch.bfloat16).max),
    torch.float16: Precision(2**-24, 2**-11, 2**-11, 2**-25, torch.finfo(torch.float16).max),
}


@dataclass
class Entry:
    """One sequence: q `[n_q, s_q, d_k]`, k `[n_k, tokens, d_k]`, v `[n_v, tokens, d_v]`, and what its queries see."""

    q: Array
    k: Array
    v: Array
    keys: Callable[[int], Sequence[int]]
    number: int = 0  # in the batch, for dropout


@dataclass
class Options:
    precision: Precision
    scale: float
    exact_scores: bool = False  # dot products of q and k have no rounding error in float32
    softcap: float = 0.0
    sinks: Array | None = None
    dropped: int = 0  # of 65536 numbers
    seed: int = 0
    offset: int = 0


@dataclass
class Result:
    """Values and their allowed errors, by name."""

    values: dict[str, Array] = field(default_factory=dict)
    allowed: dict[str, Array] = field(default_factory=dict)

    def zeros(self, name: str, shape: tuple[int, ...]) -> None:
        self.values[name], self.allowed[name] = np.zeros(shape), np.zeros(shape)

    def add(self, name: str, at: object, value: Array | float, error: Array | float) -> None:
        self.values[name][at] += value
        self.allowed[name][at] += error

    def rounded(self, name: str, p: Precision) -> None:
        """The last rounding, to the dtype of the result."""
        self.allowed[name] += p.results * np.abs(self.values[name]) + p.least


# ---- keys, dropout ---------------------------------------------------------------------------------------------------


def seen(
    position: int,
    tokens: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    start: int | None = None,
    end: int | None = None,
) -> list[int]:
    """The keys that the query at this position of the sequence sees."""

    def sees(key: int) -> bool:
        behind = position - key  # how far back the key lies
        if causal and behind < 0:
            return False
        if window[0] != -1 and behind > window[0]:
            return False
        if window[1] != -1 and -behind > window[1]:
            return False
        return (start is None or key >= start) and (end is None or key < end)

    return [key for key in range(tokens) if sees(key)]


def kept_by_dropout(o: Options, entry: int, head: int, n_q: int, query: int, keys: Array) -> Array:
    """Philox4x32-10 with Python's integers: the number of 16 bits of a key decides; bool for each of keys."""
    words: dict[int, list[int]] = {}
    for eight in sorted({int(key) // 8 for key in keys}):
        c, k = [eight, query, entry * n_q + head, o.offset], [o.seed % 2**32, o.seed // 2**32 % 2**32]
        for _ in range(10):
            left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [right // 2**32 ^ c[1] ^ k[0], right % 2**32, left // 2**32 ^ c[3] ^ k[1], left % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words[eight] = [half for word in c for half in (word % 65536, word // 65536)]
    return np.array([words[int(key) // 8][int(key) % 8] >= o.dropped for key in keys], dtype=bool)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What one query of one head does with the n keys it sees."""

    weights: Array  # [n], without dropout
    errors: Array  # [n]
    slopes: Array  # [n]: d capped score / d score
    slope_errors: Array
    sink: float  # the sink's weight
    sink_error: float
    lse: float
    lse_error: float
    again: Array  # [n]: relative errors of the weights that the backward pass computes from lse
    sink_again: float


def _log_sums_of_others(x: Array) -> Array:
    """For each element, the logarithm of the sum of exp of all others."""
    before = np.concatenate([[-np.inf], np.logaddexp.accumulate(x)[:-1]])
    behind = np.concatenate([np.logaddexp.accumulate(x[::-1])[::-1][1:], [-np.inf]])
    return np.logaddexp(before, behind)


def _shares(x: Array, others: Array) -> Array:
    """exp(x) / (exp(x) + exp(others)); 0 where x is -inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(x == -np.inf, 0.0, 1 / (1 + np.exp(others - x)))


def softmax(q: Array, k: Array, sink: float | None, o: Options) -> Row:
    """q `[d_k]`, k `[n, d_k]`, n > 0 or a sink."""
    p, n = o.precision, len(k)
    products = k @ q
    x = products * o.scale
    size = np.abs(k) @ np.abs(q) * abs(o.scale)
    slopes, slope_errors = np.ones(n), np.zeros(n)
    rounding = np.zeros(n) if o.exact_scores else p.sums * (4 + len(q) / 4) * size
    if o.softcap:
        c, shift = o.softcap, rounding + 4 * p.sums * np.abs(x)
        tanh = np.tanh(x / c)
        low, high = np.tanh((x - shift) / c), np.tanh((x + shift) / c)
        slopes = 1 / np.cosh(np.clip(x / c, -300, 300)) ** 2
        slope_errors = np.maximum(np.abs(low**2 - tanh**2), np.abs(high**2 - tanh**2)) + 12 * p.sums * tanh**2
        x = c * tanh
        shift = c * np.maximum(high - tanh, tanh - low) + 8 * p.sums * np.abs(x)
    elif o.exact_scores and n:
        # Differences of large scores are exact, too; small ones may be multiplied first.
        shift = 4 * p.sums * (np.abs(x - x.max()) + np.minimum(np.abs(x), 200))
    else:
        shift = rounding + 4 * p.sums * np.abs(x)
    if sink is not None:
        x = np.append(x, sink)
        shift = np.append(shift, 4 * p.sums * (np.abs(x[:-1]).max(initial=0) + (0 if math.isinf(sink) else abs(sink))))
    shift = shift + p.sums * (8 + n / 8)  # exponentials and their sum
    if p.weights == 2**-8:
        shift = shift + 4e-6  # exponentials for bfloat16
    top = x.max()
    if top == -np.inf:
        return Row(np.zeros(n), np.zeros(n), slopes, slope_errors, 0.0, 0.0, -np.inf, 0.0, np.zeros(n), 0.0)
    size, x = np.abs(x), x - top  # what follows is about differences, that must not drown in what all scores share
    log_sum = math.log(math.fsum(np.exp(x)))
    lse = top + log_sum
    weights = np.exp(x - log_sum)
    others_high, others_low = _log_sums_of_others(x + shift), _log_sums_of_others(x - shift)
    errors = np.maximum(_shares(x + shift, others_low) - weights, weights - _shares(x - shift, others_high))
    errors = np.maximum(errors, 0) + 1e-37
    errors += (weights + errors) * np.expm1(min(p.lse * abs(lse), 100))
    high = np.logaddexp.reduce(x + shift) - log_sum
    low = log_sum - np.logaddexp.reduce(x - shift)
    lse_error = max(high, low) + 4 * p.sums * max(abs(lse), 1)
    if o.exact_scores:
        lse_error += 2 * p.sums * abs(top)
    sink_weight, sink_error = (weights[n], errors[n]) if sink is not None else (0.0, 0.0)
    # lse is the maximum plus log_sum, rounded; a score is rounded the same each time, unless it is computed in another
    # order, and exact if the scale does not change its digits.
    again = np.full(len(x), min(2 * p.sums * abs(lse), log_sum)) + 4 * p.sums * np.minimum(size, 200)
    if not o.exact_scores or o.softcap or abs(math.frexp(o.scale)[0]) != 0.5:
        again += np.where(x == 0, 0, 2 * p.sums * size)
    if p.lse:
        again += 2 * shift + lse_error
    again = np.expm1(np.minimum(again, 100))
    sink_again = again[n] if sink is not None else 0.0
    return Row(
        weights[:n], errors[:n], slopes, slope_errors, sink_weight, sink_error, lse, lse_error, again[:n], sink_again
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def attend(entries: list[Entry], o: Options, douts: list[Array] | None = None, dlses: list[Array] | None = None):
    """For each entry a `Result` with out `[n_q, s_q, d_v]` and lse `[n_q, s_q]`; with douts also dq, dk and dv.

    Also the gradient of the sinks over all entries, in a `Result` of its own.
    """
    dsinks, results = Result(), []
    if o.sinks is not None:
        dsinks.zeros("dsinks", o.sinks.shape)
    for at, entry in enumerate(entries):
        r, (n_q, s_q, _) = Result(), entry.q.shape
        r.zeros("out", (n_q, s_q, entry.v.shape[2]))
        r.zeros("lse", (n_q, s_q))
        if douts is not None:
            for name, x in (("dq", entry.q), ("dk", entry.k), ("dv", entry.v)):
                r.zeros(name, x.shape)
        for query in range(s_q):
            keys = np.array(entry.keys(query), dtype=np.int64)
            for head in range(n_q):
                gradients = None
                if douts is not None:
                    dlse = 0.0 if dlses is None else dlses[at][head, query]
                    gradients = (douts[at][head, query], dlse, dsinks)
                with np.errstate(invalid="ignore"):  # 0 times an error that has no bound has none
                    _attend_row(r, entry, o, query, head, keys, gradients)
        for name in r.values:
            if name != "lse":
                r.rounded(name, o.precision)
        results.append(r)
    return results, dsinks


def _attend_row(r: Result, entry: Entry, o: Options, query: int, head: int, keys: Array, gradients) -> None:
    p, n_q, n = o.precision, len(entry.q), len(keys)
    k_head, v_head = head * len(entry.k) // n_q, head * len(entry.v) // n_q
    sink = None if o.sinks is None else float(o.sinks[head])
    if n == 0 and sink is None:
        r.values["lse"][head, query] = -np.inf
        return
    q, k, v = entry.q[head, query], entry.k[k_head, keys], entry.v[v_head, keys]
    row = softmax(q, k, sink, o)
    r.values["lse"][head, query], r.allowed["lse"][head, query] = row.lse, row.lse_error
    if n == 0 and gradients is None:
        return
    factor = np.ones(n)
    if o.dropped:
        kept = kept_by_dropout(o, entry.number, head, n_q, query, keys)
        factor = np.where(kept, 65536 / (65536 - o.dropped), 0.0)
    used, size = row.weights * factor, np.abs(v)
    long = p.sums * (4 + n / 4)
    out = used @ v
    used_error = p.rounded(used, row.errors * factor)
    out_error = (used_error + long * (used + used_error)) @ size
    r.add("out", (head, query), out, out_error)
    if gradients is None:
        return

    dout, dlse, dsinks = gradients
    abs_dout = np.abs(dout)
    wide = p.sums * (4 + len(dout) / 4)
    dp = factor * (v @ dout)
    dp_error = wide * factor * (size @ abs_dout)
    dot = float(used @ (v @ dout))
    most_out = np.abs(out) + out_error
    stored_error = np.where(most_out < p.largest, out_error + (p.results + wide) * most_out + p.least, np.inf)
    dot_error = abs_dout @ stored_error
    inner = dp - dot + dlse
    inner_error = dp_error + dot_error + 2 * p.sums * (np.abs(dp) + abs(dot) + abs(dlse))
    errors = row.errors + (row.weights + row.errors) * row.again
    ds, most = row.weights * inner, row.weights + errors
    ds_error = p.rounded(ds, errors * np.abs(inner) + most * inner_error)
    dx = ds * row.slopes
    dx_error = p.rounded(dx, ds_error * (row.slopes + row.slope_errors) + np.abs(ds) * row.slope_errors)
    scale, abs_k, abs_q, most_dx = abs(o.scale), np.abs(k), np.abs(q), np.abs(dx) + dx_error
    r.add("dq", (head, query), o.scale * (dx @ k), scale * ((dx_error + long * most_dx) @ abs_k))
    many = p.sums * (4 + entry.q.shape[1] * n_q / len(entry.k) / 4)
    r.add("dk", (k_head, keys), o.scale * np.outer(dx, q), scale * np.outer(dx_error + many * most_dx, abs_q))
    used_error = p.rounded(used, errors * factor)
    dv_error = used_error + many * (used + used_error)
    r.add("dv", (v_head, keys), np.outer(used, dout), np.outer(dv_error, abs_dout))
    if sink is not None:
        value = row.sink * (dlse - dot)
        error = row.sink_error + (row.sink + row.sink_error) * (8 * p.sums + row.sink_again)
        dsinks.add("dsinks", head, value, error * (abs(dlse - dot) + dot_error) + row.sink * dot_error)


# ---- selective V -----------------------------------------------------------------------------------------------------


def best_first(products: Array, keys: Sequence[int], scale: float) -> list[int]:
    """keys from the best to the worst: score descending (ascending if the scale is negative), then key ascending."""
    sign = 1 if scale < 0 else -1
    return [key for _, key in sorted((sign * float(s), key) for s, key in zip(products, keys, strict=True))]


# ---- cache, feed-forward ---------------------------------------------------------------------------------------------


def normalised(x: Array, weight: Array, eps: float) -> Array:
    """weight * x over the root of the mean square of each row; squares and their sums overflow as those of float32."""
    with np.errstate(all="ignore"):
        squares = np.square(x.astype(np.float32)).astype(np.float64)
        sums = squares.sum(axis=-1, keepdims=True)
        mean = np.where(sums > FLOAT32.max, math.inf, sums) / x.shape[-1]
        return weight * (x / np.sqrt(mean + np.float32(eps)))


def rotated(k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """One token's k `[heads, d_k]` turned as complex numbers, and what its products amount to."""
    half = len(cos) // 2
    pairs = k[:, :half] + 1j * k[:, half : 2 * half]
    turns = cos + 1j * sin
    out, size = k.copy(), np.abs(k)
    out[:, :half] = (pairs * turns[:half]).real
    out[:, half : 2 * half] = (pairs * turns[half:]).imag
    size[:, : 2 * half] = np.tile(np.abs(k[:, :half]) + np.abs(k[:, half : 2 * half]), 2) * np.maximum(
        np.abs(cos), np.abs(sin)
    )
    return out, size


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


# ---- linear layers ---------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """Weights of a linear layer `[n, k]`: factor * number + zero, in groups of input features."""

    numbers: Array  # integers, or the weights themselves
    factors: Array | None = None  # [n, groups]
    zeros: Array | None = None

    def dense(self) -> tuple[Array, Array]:
        """The weights, and the absolute values of what they are added up from."""
        if self.factors is None:
            return self.numbers, np.abs(self.numbers)
        size = self.numbers.shape[1] // self.factors.shape[1]
        products = self.numbers * np.repeat(self.factors, size, axis=1)
        zeros = 0.0 if self.zeros is None else np.repeat(self.zeros, size, axis=1)
        return products + zeros, np.abs(products) + np.abs(zeros)


def linear(x: Array, w: Weights, bias: Array | None, p: Precision, kernels: bool) -> Result:
    """x `[rows, k]` times the weights, in a `Result` with out `[rows, n]`."""
    rows, k = x.shape
    dense, parts = w.dense()
    r = Result()
    r.zeros("out", (rows, len(dense)))
    exact, size = x @ dense.T, np.abs(x) @ parts.T
    if w.factors is None:
        error = p.sums * (4 + k) * size
    elif kernels:
        groups = w.factors.shape[1]
        error = p.sums * (8 + groups) * size + _integers_of_x(x, groups) @ np.abs(dense).T
        # What is summed up of a group are products of integers, before the factor makes them smaller.
        before = np.abs(x).reshape(rows, groups, k // groups).max(-1) * (k // groups) * np.abs(w.numbers).max(initial=0)
        error[before.max(-1) >= FLOAT32.max] = np.inf
    else:
        error = (p.weights + p.sums * (8 + k)) * size
    if bias is not None:
        if not kernels:  # torch rounds to the dtype before it adds the bias, or begins its sum with it
            error = error + p.results * (np.abs(exact) + error) + p.sums * k * np.abs(bias)
        exact, size = exact + bias, size + np.abs(bias)
        error = error + p.sums * size
    error[~(size < p.on_the_way)] = np.inf
    least = p.least * (1 + np.abs(dense).sum(1) + np.abs(x).sum(1)[:, None])  # numbers below the normal ones may be 0
    r.add("out", slice(None), exact, np.nan_to_num(error + least, nan=np.inf))
    # A number that is none makes its row so, and so does an infinity among integers, which it cannot become one of.
    lost = np.isnan(x).any(1)
    if kernels and w.factors is not None:
        lost |= np.isinf(x).any(1)
    r.values["out"][lost], r.allowed["out"][lost] = np.nan, 0.0
    r.rounded("out", p)
    r.allowed["out"][lost] = 0.0
    return r


def _integers_of_x(x: Array, groups: int) -> Array:
    """How far the 16-bit integers of a group of x, times their scale, may be from x: half an integer, and what float32
    rounds of the scale, its inverse and their products with x."""
    unit = np.maximum(np.abs(x).reshape(len(x), groups, x.shape[1] // groups).max(-1), 1e-30) / 32767
    return np.repeat(unit * (0.5 + 4 * 32767 * 2**-24), x.shape[1] // groups, axis=1)
