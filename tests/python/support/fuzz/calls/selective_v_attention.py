"""Calls of selective_v_attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import Draw, numbers
from .base import Circumstances, check, close, oracle_options, precision_of, same_bits
from .caches import Filled, check_alone

MAX_ADDED = 4  # selective_v_attention with max_error adds rows up to that many times top_k


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
    o = oracle_options(options, f.d_k, None, precision_of(f.dtype, here.kernels), f.exact)
    for e, entry in enumerate(f.entries()):
        for query in range(f.s_q):
            keys = entry.keys(query)
            for head in range(f.n_q):
                row = {name: x[e, head, query] for name, x in results.items()}
                text = f"entry {e}, head {head}, query {query}: "
                _check_row(text, row, entry, f.starts[e], head, query, keys, options, o, here.kernels)
    if top_k > longest and d.chance(0.5):
        options["top_k"] = d.choice(10**7, 2**31, 2**40, 2**62)  # the same rows, and nothing to list them in
    same_bits("out without return_stats", here.call(lambda: call(stats=False))["out"], results["out"])
    options["top_k"] = top_k
    here.check_threads(call, results)
    check_alone(d, here, call, results, len(f.lengths))


def _check_row(text, got, entry, start, head, query, keys, options, o, kernels) -> None:
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
