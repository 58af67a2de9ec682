"""Argument checks of the plain-torch paths and the fake kernels; the compiled ops make the same ones in C++.

A violation is a TypeError (not a tensor, wrong dtype) or an ArgumentError, `argument: got ..., want ...`, before
anything is written. Values of tensors are looked at on the CPU only: elsewhere that would synchronise.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..reference import PANEL_TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINING_DTYPES = (*DTYPES, torch.float64)
ROWS, PANELS = 0, 1
MOST_SCALE = 1e38  # times log2(e) it is still a number of float32
MOST_INDICES = 2**27  # that selective_v_attention takes behind those that the cache can fill: 1 GiB
_DEBUG = os.environ.get("DIFFQKV_DEBUG") == "1"


class ArgumentError(ValueError, RuntimeError):
    """A wrong value or shape: Python's name for it is ValueError, torch and FlashAttention raise RuntimeError."""


class CacheShape(NamedTuple):
    """Head counts, dims and size of a cache."""

    n_k: int
    n_v: int
    d_k: int
    d_v: int
    pages: int
    page_size: int
    capacity: int  # tokens an entry can hold


def gcd(a: int, b: int) -> int:
    """math.gcd, which torch.compile cannot trace where sizes are dynamic."""
    while b != 0:
        a, b = b, a % b
    return a


def wrong(name: str, got: object, want: str, error: type[Exception] = ArgumentError) -> Exception:
    return error(f"{name}: got {got}, want {want}")


def readable(x: Tensor) -> bool:
    """Whether the values of x may be looked at here."""
    return (
        (x.device.type == "cpu" or (_DEBUG and x.device.type == "cuda"))
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refused_kind(name: str, x: Tensor) -> Exception | None:
    """The exception for a tensor whose elements do not lie in memory by strides."""
    if x.is_nested:
        kind = "nested"
    elif x.is_quantized:
        kind = "quantized"
    elif x.layout != torch.strided:
        kind = str(x.layout).removeprefix("torch.").lstrip("_")  # sparse_coo, sparse_csr, mkldnn
    else:
        return None
    return wrong(name, f"a {kind} tensor", "a dense (strided) tensor", TypeError)


def _tensor(
    name: str, x: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], ranks: tuple[int, ...], want: str
) -> None:
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a Tensor", TypeError)
    if refused := refused_kind(name, x):
        raise refused
    if x.dtype not in dtypes:
        raise wrong(name, f"dtype {_dtype_name(x.dtype)}", " or ".join(map(_dtype_name, dtypes)), TypeError)
    if x.device != like.device:
        raise wrong(name, f"device {x.device}", f"{like.device}, where the other tensors are")
    if x.dim() not in ranks:
        raise wrong(name, f"shape {list(x.shape)}", want)


def _float_tensor(
    name: str, x: Tensor, like: Tensor, ranks: tuple[int, ...], want: str, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    _tensor(name, x, like, dtypes if x is like else (like.dtype,), ranks, want)
    if x.stride(-1) != 1 and x.numel() > 0:
        raise wrong(name, f"stride {x.stride(-1)} in the last dimension", "1")


def _head_dim(name: str, d: int) -> None:
    if d % 8 != 0 or d < 8 or d > 256:
        raise wrong(name, f"head dimension {d}", "a multiple of 8 from 8 to 256")


def _heads(name: str, n: int, n_q: int) -> None:
    if n < 1 or n_q % n != 0:
        raise wrong(name, f"{n} heads", f"a divisor of q's {n_q} heads")


def _shape(name: str, x: Tensor, shape: tuple[int, ...], want: str) -> None:
    if tuple(x.shape) != shape:
        raise wrong(name, f"shape {list(x.shape)}", f"{want} = {list(shape)}")


def _values(name: str, x: Tensor, low: int | Tensor, high: int | Tensor, want: str) -> None:
    if not readable(x):
        return
    bad = (x < low) | (x > high)
    if bad.any():
        raise wrong(name, int(x[bad][0]), want)


def _per_entry(name: str, x: Tensor, like: Tensor, batch: int) -> None:
    _tensor(name, x, like, (torch.int32,), (1,), f"[b] = [{batch}]")
    _shape(name, x, (batch,), "[b]")
    if not x.is_contiguous():
        raise wrong(name, f"stride {x.stride(0)}", "1")


def _blocks(block_table: Tensor, needed: Tensor, pages: int) -> None:
    """needed: bool `[b, max_blocks]`, the entries that will be looked up."""
    _values("block_table", block_table[needed], 0, pages - 1, f"0 to {pages - 1}, a block of the pool")


def _cache(like: Tensor, batch: int, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, k_layout: int):
    want_v = "[b or blocks, G, s, n_v / G, d_v]"
    _float_tensor("v_cache", v_cache, like, (5,), want_v)
    pages, groups, page_size, v_per_group, d_v = v_cache.shape
    if k_layout == ROWS:
        want_k = "[b or blocks, G, s, n_k / G, d_k]"
        _float_tensor("k_cache", k_cache, like, (5,), want_k)
        if k_cache.shape[1] != groups:
            raise wrong("k_cache", f"{k_cache.shape[1]} groups", f"the {groups} of v_cache")
        n_k, d_k = k_cache.shape[1] * k_cache.shape[3], k_cache.shape[4]
    elif k_layout == PANELS:
        pairs = like.dtype == torch.bfloat16
        want_k = f"[b or blocks, n_k, ceil(s / 32), {'d_k / 2, 32, 2' if pairs else 'd_k, 32'}]"
        _float_tensor("k_cache", k_cache, like, (6 if pairs else 5,), want_k)
        n_k, d_k = k_cache.shape[1], k_cache.shape[3] * (2 if pairs else 1)
    else:
        raise wrong("k_layout", k_layout, "0 (rows) or 1 (panels)")
    n_v = groups * v_per_group
    _head_dim("k_cache", d_k)
    _head_dim("v_cache", d_v)
    if n_k < 1:
        raise wrong("k_cache", f"{n_k} heads", "at least 1")
    if n_v < 1 or groups != gcd(n_k, n_v):
        raise wrong(
            "v_cache", f"{groups} groups for {n_k} K and {n_v} V heads", f"gcd(n_k, n_v) = {gcd(n_k, n_v)} groups"
        )
    if k_layout == ROWS:
        _shape("k_cache", k_cache, (pages, groups, page_size, n_k // groups, d_k), want_k)
    else:
        panel = (d_k // 2, PANEL_TOKENS, 2) if pairs else (d_k, PANEL_TOKENS)
        _shape("k_cache", k_cache, (pages, n_k, -(-page_size // PANEL_TOKENS), *panel), want_k)
        strides = (2 * PANEL_TOKENS, 2, 1) if pairs else (PANEL_TOKENS, 1)
        if k_cache.numel() and k_cache.stride()[3:] != strides:
            raise wrong("k_cache", f"strides {list(k_cache.stride())}", f"{list(strides)} inside a panel")
    capacity = page_size
    if block_table is None:
        if pages != batch:
            raise wrong("v_cache", f"{pages} entries", f"the batch size, {batch}")
    else:
        _tensor("block_table", block_table, like, (torch.int32,), (2,), "[b, max_blocks]")
        if block_table.shape[0] != batch:
            raise wrong("block_table", f"shape {list(block_table.shape)}", f"[b, max_blocks] with b = {batch}")
        if block_table.stride(1) != 1:
            raise wrong("block_table", f"stride {block_table.stride(1)} in the last dimension", "1")
        if page_size < 1 or (k_layout == PANELS and page_size % PANEL_TOKENS != 0):
            raise wrong("v_cache", f"block size {page_size}", f"a multiple of {PANEL_TOKENS if k_layout else 1}")
        capacity = block_table.shape[1] * page_size
    return CacheShape(n_k, n_v, d_k, d_v, pages, page_size, capacity)


def _v_stats(v_stats: Tensor | None, like: Tensor, batch: int, n_v: int, d_v: int) -> None:
    if v_stats is None:
        return
    want = "[b, n_v, d_v + 1]"
    _tensor("v_stats", v_stats, like, (torch.float32,), (3,), want)
    _shape("v_stats", v_stats, (batch, n_v, d_v + 1), want)
    if not v_stats.is_contiguous():
        raise wrong("v_stats", f"strides {list(v_stats.stride())}", "a contiguous tensor")


def _options(
    q: Tensor,
    n_q: int,
    batch: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> None:
    for name, value in (("window_left", window_left), ("window_right", window_right)):
        if value < -1:
            raise wrong(name, value, "a number of tokens, or -1 (unlimited)")
    if softmax_scale is not None and not -MOST_SCALE <= softmax_scale <= MOST_SCALE:
        raise wrong("softmax_scale", softmax_scale, "a number from -1e38 to 1e38")
    if not 0 <= softcap <= MOST_SCALE:
        raise wrong("softcap", softcap, "0 (none) to 1e38")
    if sinks is not None:
        _tensor("sinks", sinks, q, tuple(dict.fromkeys((torch.float32, q.dtype))), (1,), f"[n_q] = [{n_q}]")
        _shape("sinks", sinks, (n_q,), "[n_q]")
        if not sinks.is_contiguous():
            raise wrong("sinks", f"stride {sinks.stride(0)}", "1")
    for name, x in (("kv_start", kv_start), ("kv_end", kv_end)):
        if x is not None:
            _per_entry(name, x, q, batch)
    if not 0 <= dropout_p < 1:
        raise wrong("dropout_p", dropout_p, "a probability in [0, 1)")
    if not 0 <= offset < 2**32:
        raise wrong("offset", offset, "an integer from 0 to 2**32 - 1")


def _training_tensors(q: Tensor, k: Tensor, v: Tensor, rank: int, shape_q: str, shape_k: str, shape_v: str) -> None:
    for name, x, want in (("q", q, shape_q), ("k", k, shape_k), ("v", v, shape_v)):
        _float_tensor(name, x, q, (rank,), want, TRAINING_DTYPES)
    _head_dim("q", q.shape[-1])
    _head_dim("v", v.shape[-1])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> None:
    _training_tensors(q, k, v, 4, "[b, n_q, s_q, d_k]", "[b, n_k, s_k, d_k]", "[b, n_v, s_k, d_v]")
    batch, n_q, _, d_k = q.shape
    n_k, s_k, n_v, d_v = k.shape[1], k.shape[2], v.shape[1], v.shape[3]
    _shape("k", k, (batch, n_k, s_k, d_k), "[b, n_k, s_k, d_k]")
    _shape("v", v, (batch, n_v, s_k, d_v), "[b, n_v, s_k, d_v]")
    _heads("k", n_k, n_q)
    _heads("v", n_v, n_q)
    _options(q, n_q, batch, *options, **named)


def _cu_seqlens(which: str, x: Tensor, total: int, longest: int) -> None:
    """cu_seqlens_q or cu_seqlens_k, for a tensor of `total` rows; longest: the max_seqlen that belongs to it."""
    if not readable(x):
        return
    name, lengths = f"cu_seqlens_{which}", x.diff()
    if x[0] != 0:
        raise wrong(name, f"{int(x[0])} first", "0")
    if (lengths < 0).any():
        raise wrong(name, f"an entry of length {int(lengths.min())}", "values that never decrease")
    if x[-1] != total:
        raise wrong(name, f"{int(x[-1])} last", f"{total}, the tokens of {which}")
    if (lengths > longest).any():
        want = f"at least {int(lengths.max())}, the longest sequence of {name}"
        raise wrong(f"max_seqlen_{which}", longest, want)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
    **named: Any,
) -> None:
    _training_tensors(q, k, v, 3, "[total_q, n_q, d_k]", "[total_k, n_k, d_k]", "[total_k, n_v, d_v]")
    (total_q, n_q, d_k), (total_k, n_k, _), (_, n_v, d_v) = q.shape, k.shape, v.shape
    _shape("k", k, (total_k, n_k, d_k), "[total_k, n_k, d_k]")
    _shape("v", v, (total_k, n_v, d_v), "[total_k, n_v, d_v]")
    _heads("k", n_k, n_q)
    _heads("v", n_v, n_q)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _tensor(name, x, q, (torch.int32,), (1,), "[b + 1]")
        if x.shape[0] < 1:
            raise wrong(name, "shape [0]", "[b + 1]")
        if not x.is_contiguous():
            raise wrong(name, f"stride {x.stride(0)}", "1")
    _shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "[b + 1], the shape of cu_seqlens_q")
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            raise wrong(name, value, "an integer >= 0")
    _cu_seqlens("q", cu_seqlens_q, total_q, max_seqlen_q)
    _cu_seqlens("k", cu_seqlens_k, total_k, max_seqlen_k)
    _options(q, n_q, cu_seqlens_q.shape[0] - 1, *options, **named)


def gradients(q: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, shape: tuple, lse_shape: tuple):
    """Of a backward op: what comes back to out and lse, of the shapes given."""
    for name, x in (("dout", dout), ("out", out)):
        _tensor(name, x, q, (q.dtype,), (len(shape),), f"the shape of out, {list(shape)}")
        _shape(name, x, shape, "the shape of out")
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    for name, x in (("dlse", dlse), ("lse", lse)):
        if x is not None or name == "lse":
            _tensor(name, x, q, (lse_dtype,), (len(lse_shape),), f"the shape of lse, {list(lse_shape)}")
            _shape(name, x, lse_shape, "the shape of lse")


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    cache_start: Tensor | None,
    block_table: Tensor | None,
    k_layout: int,
    **options: Any,
) -> CacheShape:
    """options: those that decode_attention shares with flash_attention."""
    _float_tensor("q", q, q, (4,), "[b, n_q, s_q, d_k]")
    batch, n_q, _, d_k = q.shape
    cache = _cache(q, batch, k_cache, v_cache, block_table, k_layout)
    if cache.d_k != d_k:
        raise wrong("q", f"head dimension {d_k}", f"that of k_cache, {cache.d_k}")
    _heads("k_cache", cache.n_k, n_q)
    _heads("v_cache", cache.n_v, n_q)
    _per_entry("cache_seqlens", cache_seqlens, q, batch)
    _values("cache_seqlens", cache_seqlens, 0, cache.capacity, f"0 to the cache's {cache.capacity} tokens")
    if cache_start is not None:
        _per_entry("cache_start", cache_start, q, batch)
        _values("cache_start", cache_start, 0, torch.iinfo(torch.int32).max, "0 or more")
    if block_table is not None and readable(block_table):
        first = torch.arange(block_table.shape[1], device=q.device) * cache.page_size
        needed = first < cache_seqlens[:, None]
        if cache_start is not None:
            needed = needed & (first + cache.page_size > cache_start[:, None]) & (cache_start < cache_seqlens)[:, None]
        _blocks(block_table, needed, cache.pages)
    _options(q, n_q, batch, **options)
    return cache


def selective_v_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    tail: int,
    keep_first: int,
    keep_last: int,
    v_stats: Tensor | None,
    cache_start: Tensor | None,
    block_table: Tensor | None,
    k_layout: int,
    max_error: float | None,
    softmax_scale: float | None,
    return_indices: bool,
) -> CacheShape:
    if max_error is not None and not max_error >= 0:
        raise wrong("max_error", max_error, "a number >= 0")
    for name, value, least in (("top_k", top_k, 1), ("keep_first", keep_first, 0), ("keep_last", keep_last, 0)):
        if value < least:
            raise wrong(name, value, f"an integer >= {least}")
    if tail not in (0, 1, 2):
        raise wrong("tail", tail, "0 (drop), 1 (renorm) or 2 (mean)")
    cache = decode_attention(
        q, k_cache, v_cache, cache_seqlens, cache_start, block_table, k_layout, softmax_scale=softmax_scale
    )
    if return_indices and top_k > cache.capacity and top_k > (most := MOST_INDICES // max(1, q.shape[:3].numel())):
        raise wrong("top_k", top_k, f"1 to {max(most, cache.capacity)} where indices are asked for")
    _v_stats(v_stats, q, q.shape[0], cache.n_v, cache.d_v)
    return cache


def _has_memory(x: Tensor) -> bool:
    """Not fake, functional, mapped, ..."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" and not wrapped


def _check_memory(written: dict[str, Tensor | None], read: dict[str, Tensor]) -> None:
    """Every element of what is written has a place of its own; interleaved tensors are believed."""
    if torch.compiler.is_compiling():
        return
    tensors = [(name, x) for name, x in (written | read).items() if x is not None and x.numel() > 0]
    if not all(_has_memory(x) for _, x in tensors):
        return
    extents = []
    for name, x in tensors:
        reach, apart = 0, True
        for stride, size in sorted((x.stride(i), n) for i, n in enumerate(x.shape) if n > 1):
            apart = apart and stride > reach
            reach += (size - 1) * stride
        if name in written and not apart:
            raise wrong(name, "elements that share memory", "one place for each: it is written")
        extents.append((range(x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()), reach + 1 == x.numel()))
    for i, ((name, _), (here, filled)) in enumerate(zip(tensors, extents, strict=True)):
        if name not in written:
            break
        for (other, _), (there, also_filled) in zip(tensors[i + 1 :], extents[i + 1 :], strict=True):
            meet = here[0] == there[0]
            meet = meet or (filled and (there[0] in here or there[-1] in here))
            if meet or (also_filled and (here[0] in there or here[-1] in there)):
                raise wrong(other, f"memory of {name}", f"its own: {name} is written")


def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    block_table: Tensor | None,
    v_stats: Tensor | None,
    k_layout: int,
) -> CacheShape:
    _tensor("k_cache", k_cache, k_cache, DTYPES, (5, 6), "[b or blocks, ...]")
    _float_tensor("k", k, k_cache, (4,), "[b, n_k, s_new, d_k]")
    _float_tensor("v", v, k_cache, (4,), "[b, n_v, s_new, d_v]")
    batch, _, s_new, d_k = k.shape
    cache = _cache(k, batch, k_cache, v_cache, block_table, k_layout)
    _shape("k", k, (batch, cache.n_k, s_new, cache.d_k), "[b, n_k, s_new, d_k]")
    _shape("v", v, (batch, cache.n_v, s_new, cache.d_v), "[b, n_v, s_new, d_v]")
    _tensor("positions", positions, k, (torch.int32, torch.int64), (2,), "[b, s_new]")
    _shape("positions", positions, (batch, s_new), "[b, s_new]")
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise wrong(missing, None, f"a tensor, as {given} is given")
    if cos is not None:
        for name, x in (("cos", cos), ("sin", sin)):
            _tensor(name, x, k, (torch.float32, k.dtype), (3,), "[b or 1, s_new, d_rot]")
            rows, d_rot = x.shape[0], x.shape[2]
            if rows not in (1, batch) or x.shape[1] != s_new or d_rot % 2 != 0 or d_rot > d_k:
                want = f"[{batch} or 1, {s_new}, an even number <= {d_k}]"
                raise wrong(name, f"shape {list(x.shape)}", want)
            if x.stride(-1) != 1 and x.numel() > 0:
                raise wrong(name, f"stride {x.stride(-1)} in the last dimension", "1")
        if sin.dtype != cos.dtype:
            raise wrong("sin", f"dtype {_dtype_name(sin.dtype)}", f"{_dtype_name(cos.dtype)}, that of cos", TypeError)
        _shape("sin", sin, tuple(cos.shape), "the shape of cos")
        if sin.stride() != cos.stride():
            raise wrong("sin", f"strides {list(sin.stride())}", f"{list(cos.stride())}, those of cos")
    _v_stats(v_stats, k, batch, cache.n_v, cache.d_v)
    _check_memory({"k_cache": k_cache, "v_cache": v_cache, "v_stats": v_stats}, {"k": k, "v": v})
    _values("positions", positions, -1, cache.capacity - 1, f"-1 (skip) or 0 to {cache.capacity - 1}")
    if block_table is not None and readable(block_table):
        needed = torch.zeros_like(block_table, dtype=torch.bool)
        entry, token = (positions >= 0).nonzero(as_tuple=True)
        needed[entry, positions[entry, token].long() // cache.page_size] = True
        _blocks(block_table, needed, cache.pages)
    return cache


def swiglu(gate: Tensor, up: Tensor, dout: Tensor | None = None) -> None:
    if not isinstance(gate, Tensor):
        raise wrong("gate", type(gate).__name__, "a Tensor", TypeError)
    any_rank = (gate.dim(),)
    _tensor("gate", gate, gate, DTYPES, any_rank, "")
    for name, x in (("up", up), ("dout", dout)):
        if x is not None or name == "up":
            _tensor(name, x, gate, (gate.dtype,), any_rank, f"the shape of gate, {list(gate.shape)}")
            _shape(name, x, tuple(gate.shape), "the shape of gate")
