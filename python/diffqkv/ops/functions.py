"""The public ops.

Notation of the shapes: `b` batch, `s` tokens, `n_q, n_k, n_v` heads, `d_k, d_v` head dimensions, G = gcd(n_k, n_v)
KV groups. q head i reads K head `i * n_k // n_q` and V head `i * n_v // n_q` (SIGMA, arXiv 2501.13629, eq. 16 and 17),
so n_k and n_v divide n_q. Head dimensions are multiples of 8 from 8 to 256. Tensors are float32, bfloat16 or float16,
all of one call alike, with a last dimension of stride 1 and otherwise any strides; results are contiguous. The ops
that train, `flash_attention` and `flash_attention_varlen`, also take float64, in which all of them is then computed.

Every wrong argument is a ValueError that is a RuntimeError too, as callers of torch expect it, or a TypeError if its
type or dtype is wrong, with the text `argument: got ..., want ...`, raised before anything is written. Numbers may be
numpy's, or tensors without dimensions, whose value is read; a bool is none.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..reference import LAYOUTS, TAILS, SelectiveVStats
from . import composed, dispatch, library
from .checks import ArgumentError, refused_kind, wrong
from .options import ROWS, AttentionOptions

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

if library.loaded:
    _FLASH: Callable = torch.ops.diffqkv.flash_attention.default
    _VARLEN: Callable = torch.ops.diffqkv.flash_attention_varlen.default
    _DECODE: Callable = torch.ops.diffqkv.decode_attention.default
    _UPDATE: Callable = torch.ops.diffqkv.kv_cache_update.default
    _SELECTIVE: Callable = torch.ops.diffqkv.selective_v_attention.default
    _SWIGLU: Callable = torch.ops.diffqkv.swiglu.default

_OURS = re.compile(r"diffqkv: (\w+: got (.+), want .+)")
_FUNC = "an autograd.Function with functorch transforms"
_DISPATCHER = re.compile(r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'")


# ---- calling ---------------------------------------------------------------------------------------------------------


def _translated(op: Callable, error: RuntimeError, args: tuple, kwargs: dict[str, Any]) -> Exception | None:
    """The exception that a failed op call should have been; None if the error is not about an argument."""
    text, named = str(error), {}
    if _FUNC in text:
        return NotImplementedError(f"{op._opname}: torch.func.grad (vjp, jacrev) is not built; use torch.autograd.grad")
    if isinstance(op, torch._ops.OpOverload):
        named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
        for argument in op._schema.arguments:
            if str(argument.type) == "Tensor" and named[argument.name] is None:
                return wrong(argument.name, "NoneType", "a Tensor", TypeError)
    for name, x in named.items():
        if isinstance(x, Tensor) and (refused := refused_kind(name, x)):
            return refused
    if ours := _OURS.search(text):
        return (TypeError if ours[2].startswith("dtype ") else ArgumentError)(ours[1])
    if dispatcher := _DISPATCHER.search(text):
        want, name, got = dispatcher.groups()
        return wrong(name, got, f"a {want.removeprefix('Optional[').removesuffix(']')}", TypeError)
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    device = next((x.device for x in tensors.values()), None)
    for name, x in tensors.items():
        if x.device != device:
            return wrong(name, f"device {x.device}", f"{device}, where the other tensors are")
    return None


def _call(op: Callable, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        translated = _translated(op, error, args, kwargs)
        if translated is None:
            raise
        raise translated from None


def _write(op: Callable, written: tuple[Tensor | None, ...], *args: Any, **kwargs: Any) -> None:
    """Calls an op that writes `written`, and counts their versions up, as `rules.autograd` does, but without a way
    through a Python kernel, which takes several microseconds.
    """
    if torch.compiler.is_compiling():
        op(*args, **kwargs)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _call(op, *args, **kwargs)
    torch.autograd.graph.increment_version([x for x in written if x is not None])


def _uses_kernel(op: str, name: str, x: Tensor, *inputs: Tensor | None, k_layout: int = ROWS) -> bool:
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a Tensor", TypeError)
    return dispatch.uses_kernel(op, x, *inputs, k_layout=k_layout)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    """The number that the schemas have for the string."""
    if not isinstance(value, str):
        raise wrong(name, type(value).__name__, "a str", TypeError)
    if value not in choices:
        raise wrong(name, repr(value), " or ".join(map(repr, choices)))
    return choices.index(value)


def _refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise wrong(name, "requires_grad=True in grad mode", f"torch.no_grad(): {op} is for inference only")


def _index(name: str, value: SupportsIndex) -> int:
    """value as an int, where it is none of Python's: a numpy integer, an integer tensor without dimensions."""
    if torch.compiler.is_compiling():  # which has no value to read
        raise wrong(name, f"{type(value).__name__} in compiled code", "an int: convert it outside", TypeError)
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"Tensor of {value.dtype}, shape {list(value.shape)}"
        is_index = value.dim() == 0 and value.dtype != torch.bool
    else:
        is_index = not isinstance(value, bool)
    try:
        if is_index:
            return operator.index(value)
    except TypeError:
        pass
    raise wrong(name, got, "an int", TypeError)


def _integer(name: str, value: SupportsIndex, low: int, high: int = 2**63 - 1) -> int:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        value = _index(name, value)
    if value < low or value > high:
        raise wrong(name, value, f"an integer >= {low}" if high == 2**63 - 1 else f"an integer from {low} to {high}")
    return value


def _number(name: str, value: float) -> float:
    """value, as a float if it is none of Python's numbers: one of numpy's, a tensor without dimensions."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return value
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        is_real = value.dim() == 0 and (value.is_floating_point() or value.dtype in _INTEGERS)
    if not is_real:
        raise wrong(name, type(value).__name__, "a number", TypeError)
    return float(value)


def _scale(softmax_scale: float | None) -> float | None:
    return None if softmax_scale is None else _number("softmax_scale", softmax_scale)


def _refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Refuses tensors with tangents, for which torch would take the compiled ops for constants."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if isinstance(x, Tensor) and unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode differentiation is not built")


def _window(window: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)):
        raise wrong("window", type(window).__name__, "a tuple (left, right)", TypeError)
    if len(window) != 2:
        raise wrong("window", window, "two integers, left and right")
    left, right = (_integer("window", n, -1) for n in window)
    return left, right


def _drawn(dropout_p: float, seed: int | None) -> int:
    """The seed of a call; one that is not given comes from torch's default generator on the CPU."""
    if seed is not None:
        seed = _integer("seed", seed, -(2**63))
    if dropout_p == 0:
        return 0
    if seed is None:
        if torch.compiler.is_compiling():
            raise wrong("seed", None, "an int where torch.compile traces dropout: it cannot draw one for each call")
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return seed


def _attention_options(
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    dropout_p: float,
    seed: int | None,
    offset: int,
) -> AttentionOptions:
    offset = _integer("offset", offset, 0, 2**32 - 1)
    dropout_p = _number("dropout_p", dropout_p)
    scores = _scale(softmax_scale), *_window(window), _number("softcap", softcap)
    return AttentionOptions(causal, *scores, sinks, kv_start, kv_end, dropout_p, _drawn(dropout_p, seed), offset)


# ---- ops -------------------------------------------------------------------------------------------------------------


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with unequal numbers of K and V heads (eq. 16 and 17), without a matrix of scores; differentiable once.

    The backward pass computes the scores again from lse, as FlashAttention does (arXiv 2205.14135, algorithm 4). Beside
    its results it takes memory for tiles on each thread and, of 16-bit inputs, for q's gradient in float32.

    Args:
        q: `[b, n_q, s_q, d_k]`.
        k: `[b, n_k, s_k, d_k]`.
        v: `[b, n_v, s_k, d_v]`.
        causal: query i sees the keys j <= i + s_k - s_q (aligned at the bottom right).
        softmax_scale: factor of the scores, from -1e38 to 1e38; d_k ** -0.5 by default.
        window: (left, right): query i sees left keys before and right keys behind its own, j = i + s_k - s_q; -1: all.
        softcap: c > 0 replaces a scaled score x by c * tanh(x / c) (Gemma 2, arXiv 2408.00118).
        sinks: `[n_q]`, float32 or q's dtype, contiguous: logits of one more key per head, without a value. They count
            in the softmax and in lse (arXiv 2309.17453). Differentiable.
        kv_start, kv_end: int32 `[b]`: only the keys in [kv_start, kv_end) exist, for left or right padding. The causal
            alignment does not move. What lies outside may be NaN; its gradients are 0.
        dropout_p: in [0, 1): probability, in steps of 2 ** -16, that a softmax weight is dropped; the others are
            multiplied by 1 / (1 - dropout_p). lse is without dropout.
        seed, offset: which weights are dropped (`reference.dropout_mask`): a function of these two numbers and of the
            weight's entry, head, query and key, the same on every device. seed: 64 bits, from torch's default
            generator on the CPU by default, so that `torch.manual_seed` and activation checkpointing repeat it;
            offset: 0 to 2 ** 32 - 1.
        deterministic: neither results nor gradients ever depend on the run, the batch or the number of threads,
            whatever is given here.
        return_lse: also return the logarithm of the softmax denominator, differentiable too.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_lse also lse `[b, n_q, s_q]`, float32 (float64 of float64),
        natural logarithm. A query that sees no key gets out 0, lse -inf or its sink, and gradients 0. Under
        torch.autocast, q, k and v that are not float64 are cast to its dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; torch.compile traces dropout without a seed.
        NotImplementedError: the gradient of a gradient is asked for.
    """
    run = _uses_kernel("flash_attention", "q", q, k, v, sinks)
    options = _attention_options(
        causal, softmax_scale, window, softcap, sinks, kv_start, kv_end, dropout_p, seed, offset
    )
    if run:
        _refuse_forward_mode("flash_attention", q, k, v)
        out, lse = _call(_FLASH, q, k, v, *options)
    else:
        out, lse = composed.flash_attention(q, k, v, need_lse=return_lse, **options._asdict())
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of sequences that lie one behind another, without padding; differentiable once.

    Args:
        q: `[total_q, n_q, d_k]`.
        k: `[total_k, n_k, d_k]`.
        v: `[total_k, n_v, d_v]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[b + 1]`, contiguous: entry e owns the rows cu_seqlens[e] to
            cu_seqlens[e + 1]; they begin at 0, never decrease, and end at total_q and total_k.
        max_seqlen_q, max_seqlen_k: no entry is longer.
        kv_start, kv_end: int32 `[b]`, positions inside the entry.
        causal, softmax_scale, window, softcap, sinks, dropout_p, seed, offset, deterministic, return_lse: as in
            `flash_attention`, for each entry; the dropout of an entry is that of `flash_attention` on a batch.

    Returns:
        out `[total_q, n_q, d_v]` in q's dtype; with return_lse also lse `[n_q, total_q]`. As in `flash_attention`.

    Raises:
        ValueError, TypeError: an argument is wrong; torch.compile traces dropout without a seed. The contents of
            cu_seqlens_q and cu_seqlens_k are checked on the CPU.
        NotImplementedError: the gradient of a gradient, or torch.vmap.
    """
    run = _uses_kernel("flash_attention_varlen", "q", q, k, v, sinks)
    max_seqlen_q = _integer("max_seqlen_q", max_seqlen_q, 0)
    max_seqlen_k = _integer("max_seqlen_k", max_seqlen_k, 0)
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _attention_options(
        causal, softmax_scale, window, softcap, sinks, kv_start, kv_end, dropout_p, seed, offset
    )
    if run:
        _refuse_forward_mode("flash_attention_varlen", q, k, v)
        out, lse = _call(_VARLEN, *args, *options)
    else:
        out, lse = composed.flash_attention_varlen(*args, need_lse=return_lse, **options._asdict())
    return (out, lse) if return_lse else out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cache_start: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_layout: str = "rows",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens with everything cached; K is read once per group. For inference only.

    Args:
        q: `[b, n_q, s_q, d_k]`: the last s_q of the cached tokens, causal among themselves.
        k_cache: k_layout "rows": `[b, G, s, n_k / G, d_k]`, so that a plain `[b, n_k, s, d_k]` cache is a free view;
            "panels": `[b, n_k, ceil(s / 32), d_k, 32]` (float32, float16) or
            `[b, n_k, ceil(s / 32), d_k / 2, 32, 2]` (bfloat16), contiguous inside a panel.
        v_cache: `[b, G, s, n_v / G, d_v]`.
        cache_seqlens: int32 `[b]`, 0 to s: tokens in the cache, those of q included. Slots behind them may be NaN.
        cache_start: int32 `[b]`: first slot that counts, for left padding.
        block_table: int32 `[b, max_blocks]`. Then the first dimension of the caches counts blocks, s is the number of
            tokens of a block (a multiple of 32 in panels), and token t of entry i lies in block
            `block_table[i, t // s]`. Entries that no token needs may hold anything.
        softmax_scale: factor of the scores; d_k ** -0.5 by default.
        window, softcap, sinks: as in `flash_attention`.
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_lse also lse `[b, n_q, s_q]`, float32, natural logarithm.
        A query that sees no key gets out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode. The contents of
            cache_seqlens, cache_start and block_table are checked on the CPU.
    """
    layout = _choice("k_layout", k_layout, LAYOUTS)
    run = _uses_kernel("decode_attention", "q", q, k_layout=layout)
    if torch.is_grad_enabled():
        _refuse_gradients("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    left, right = _window(window)
    options = {
        "cache_start": cache_start,
        "block_table": block_table,
        "softmax_scale": _scale(softmax_scale),
        "k_layout": layout,
        "window_left": left,
        "window_right": right,
        "softcap": _number("softcap", softcap),
        "sinks": sinks,
    }
    if run:
        out, lse = _call(_DECODE, q, k_cache, v_cache, cache_seqlens, **options)
    else:
        out, lse = composed.decode_attention(q, k_cache, v_cache, cache_seqlens, need_lse=return_lse, **options)
    return (out, lse) if return_lse else out


def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    block_table: Tensor | None = None,
    v_stats: Tensor | None = None,
    k_layout: str = "rows",
) -> None:
    """Writes new K and V rows into a cache, in place, rotating K on the way (eq. 10, RoPE).

    Args:
        k_cache, v_cache, block_table, k_layout: as in `decode_attention`; the caches are written, and share no memory
            with each other, k or v.
        k: `[b, n_k, s_new, d_k]`.
        v: `[b, n_v, s_new, d_v]`.
        positions: int32 or int64 `[b, s_new]`: the slot of each token; -1 skips it. No two tokens of a call may have
            the same slot.
        cos, sin: `[b or 1, s_new, d_rot]`, float32 or k's dtype, d_rot even and at most d_k: rotate the first d_rot
            dimensions of k, in float32, dimension c with c + d_rot / 2 (the half-split convention).
        v_stats: float32 `[b, n_v, d_v + 1]`, written: the sum of the V rows, and last their largest L2 norm. Only the
            rows that this call writes are added; a slot that is written again counts twice.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode. On the CPU this includes a
            position outside the cache and an unmapped block; on CUDA such a token is not written, unless
            DIFFQKV_DEBUG=1 asks for the check, which synchronises.
    """
    layout = _choice("k_layout", k_layout, LAYOUTS)
    run = _uses_kernel("kv_cache_update", "k_cache", k_cache, k_layout=layout)
    if torch.is_grad_enabled():
        _refuse_gradients("kv_cache_update", k_cache=k_cache, v_cache=v_cache, k=k, v=v, cos=cos, sin=sin)
    options = {"cos": cos, "sin": sin, "block_table": block_table, "v_stats": v_stats, "k_layout": layout}
    if run:
        _write(_UPDATE, (k_cache, v_cache, v_stats), k_cache, v_cache, k, v, positions, **options)
    else:
        composed.kv_cache_update(k_cache, v_cache, k, v, positions, **options)


def selective_v_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    *,
    tail: str = "drop",
    max_error: float | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    v_stats: Tensor | None = None,
    cache_start: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    k_layout: str = "rows",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SelectiveVStats]:
    """`decode_attention` that fetches, for each query row, only the V rows of its best scores (Table 3).

    The softmax runs over all scores. The order is total: dot product descending (float32, before scaling; ascending for
    a negative scale), then index ascending. A row whose top_k reaches all it sees is dense attention.

    Args:
        q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout: as in
            `decode_attention`.
        top_k: V rows that a query row selects, at least 1. It may exceed the cache's capacity, with return_stats as
            long as indices take no more than 1 GiB.
        tail: what becomes of the softmax mass d of the rows that are not read: "drop": nothing is added, as in the
            paper; "renorm": the result is divided by 1 - d; "mean": d times the mean of the V rows that the query sees
            is added.
        max_error: the L2 distance to dense attention that a row of out may have, rounding of out apart. A row reads
            as many more of its best V rows as guarantee it, up to 4 * top_k of them; a row for which those are too few
            reads all of V. Without v_stats this takes one pass over V.
        keep_first, keep_last: rows at the beginning and the end of what a query sees that are read besides the top_k.
        v_stats: float32 `[b, n_v, d_v + 1]` as `kv_cache_update` keeps it. Without it tail "mean" and return_stats
            take one pass over V.
        return_stats: also return a `SelectiveVStats`.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_stats also lse, kept_mass, rows_used and error_bound
        `[b, n_q, s_q]` and indices int64 `[b, n_q, s_q, top_k]`: the cache positions of the top_k best rows, ascending,
        then -1. error_bound bounds the L2 distance of a row of out to dense attention, up to rounding: with Vmax the
        largest norm of a V row, d * Vmax (drop), d * (Vmax + |out|) (renorm), d * (Vmax + |mean V row|) (mean). The
        kernels add 2^-18 to d for the rounding of their sums, unless the row reads all it sees.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode.
    """
    if max_error is not None:
        max_error = _number("max_error", max_error)
    layout = _choice("k_layout", k_layout, LAYOUTS)
    tail_mode = _choice("tail", tail, TAILS)
    top_k = _integer("top_k", top_k, 1)
    keep_first = _integer("keep_first", keep_first, 0)
    keep_last = _integer("keep_last", keep_last, 0)
    run = _uses_kernel("selective_v_attention", "q", q, k_layout=layout)
    if torch.is_grad_enabled():
        _refuse_gradients("selective_v_attention", q=q, k_cache=k_cache, v_cache=v_cache, v_stats=v_stats)
    options = {
        "tail": tail_mode,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "v_stats": v_stats,
        "cache_start": cache_start,
        "block_table": block_table,
        "softmax_scale": _scale(softmax_scale),
        "k_layout": layout,
        "max_error": max_error,
        "return_bound": return_stats,
        "return_indices": return_stats,
    }
    op = _SELECTIVE if run else composed.selective_v_attention
    out, *stats = _call(op, q, k_cache, v_cache, cache_seqlens, top_k, **options)
    return (out, SelectiveVStats(*stats)) if return_stats else out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one pass, computed in float32: the activation of augmented Q (appendix E) and of the FFN.

    Args:
        gate, up: equal shapes and dtypes (float32, bfloat16, float16).

    Returns:
        A tensor of that shape and dtype; differentiable once.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    if _uses_kernel("swiglu", "gate", gate, up):
        return _call(_SWIGLU, gate, up)
    return composed.swiglu(gate, up)
