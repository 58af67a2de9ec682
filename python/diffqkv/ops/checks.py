"""Argument checks of the plain-torch paths and the fake kernels; the compiled ops make the same ones in C++.

A violation is a TypeError (not a tensor, wrong dtype) or an ArgumentError, `argument: got ..., want ...`, before
anything is written. Values of tensors are looked at on the CPU only: elsewhere that would synchronise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..reference import PANEL_TOKENS
from .options import PANELS, ROWS, AttentionOptions, DecodeOptions, SelectiveVOptions, UpdateOptions, shared

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINING_DTYPES = (*DTYPES, torch.float64)
MOST_SCALE = 1e38  # times log2(e) it is still a number of float32
MOST_INDICES = 2**27  # places of indices beyond those that the cache can fill: 1 GiB
_DEBUG = os.environ.get("DIFFQKV_DEBUG") == "1"


class ArgumentError(ValueError, RuntimeError):
    """A wrong value or shape: Python's name for it is ValueError, torch and FlashAttention raise RuntimeError."""


def wrong(name: str, got: object, want: str, error: type[Exception] = ArgumentError) -> Exception:
    return error(f"{name}: got {got}, want {want}")


def gcd(a: int, b: int) -> int:
    """math.gcd, which torch.compile cannot trace where sizes are dynamic."""
    while b != 0:
        a, b = b, a % b
    return a


def readable(x: Tensor) -> bool:
    """Whether the values of x may be looked at here."""
    return (
        (x.device.type == "cpu" or (_DEBUG and x.device.type == "cuda"))
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
    )


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Sizes(dict[str, int]):
    """The sizes that a call's shapes have in common, by name."""

    def check(self, name: str, x: Tensor, layout: str) -> None:
        """Checks x against a layout like "b n_q s_q d_k": known sizes and numbers must agree, others become known."""
        sizes = layout.split()
        wanted = [int(size) if size.isdecimal() else self.get(size) for size in sizes]
        if x.dim() != len(sizes) or any(n is not None and n != m for n, m in zip(wanted, x.shape, strict=True)):
            want = (size if n is None or size.isdecimal() else f"{size} = {n}" for size, n in zip(sizes, wanted))  # noqa: B905
            raise wrong(name, f"shape {list(x.shape)}", f"[{', '.join(want)}]")
        self.update(zip(sizes, x.shape, strict=True))


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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(name: str, x: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks all of x but its shape and strides; `like` is a tensor on the device that it must be on."""
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a Tensor", TypeError)
    if refused := refused_kind(name, x):
        raise refused
    if x.dtype not in dtypes:
        want = " or ".join(dict.fromkeys(map(_dtype_name, dtypes)))
        raise wrong(name, f"dtype {_dtype_name(x.dtype)}", want, TypeError)
    if x.device != like.device:
        raise wrong(name, f"device {x.device}", f"{like.device}, where the other tensors are")


def tensor(name: str, x: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], sizes: Sizes, layout: str) -> None:
    """Checks all of x but its strides."""
    _kind(name, x, like, dtypes)
    sizes.check(name, x, layout)


def _unit_last_stride(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise wrong(name, f"stride {x.stride(-1)} in the last dimension", "1")


def _rows(name: str, x: Tensor, like: Tensor, sizes: Sizes, layout: str, dtypes: tuple = DTYPES) -> None:
    """Checks a tensor of q, k or v; `like` is the first of its call, whose dtype is one of dtypes."""
    tensor(name, x, like, dtypes if x is like else (like.dtype,), sizes, layout)
    _unit_last_stride(name, x)


def _contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        if x.dim() == 1:
            raise wrong(name, f"stride {x.stride(0)}", "1")
        raise wrong(name, f"strides {list(x.stride())}", "a contiguous tensor")


def _head_dim(name: str, d: int) -> None:
    if d % 8 != 0 or d < 8 or d > 256:
        raise wrong(name, f"head dimension {d}", "a multiple of 8 from 8 to 256")


def heads(name: str, n: int, n_q: int) -> None:
    if n < 1 or n_q % n != 0:
        raise wrong(name, f"{n} heads", f"a divisor of q's {n_q} heads")


def values(name: str, x: Tensor, low: int | Tensor, high: int | Tensor, want: str) -> None:
    if not readable(x):
        return
    bad = (x < low) | (x > high)
    if bad.any():
        raise wrong(name, int(x[bad][0]), want)


def per_entry(name: str, x: Tensor, like: Tensor, sizes: Sizes) -> None:
    tensor(name, x, like, (torch.int32,), sizes, "b")
    _contiguous(name, x)


# ---- options ---------------------------------------------------------------------------------------------------------


def attention_options(q: Tensor, sizes: Sizes, options: AttentionOptions) -> None:
    """Checks the options of a call on q, whose b and n_q are among the sizes."""
    for name in ("window_left", "window_right"):
        if (tokens := getattr(options, name)) < -1:
            raise wrong(name, tokens, "a number of tokens, or -1 (unlimited)")
    if options.softmax_scale is not None and not -MOST_SCALE <= options.softmax_scale <= MOST_SCALE:
        raise wrong("softmax_scale", options.softmax_scale, "a number from -1e38 to 1e38")
    if not 0 <= options.softcap <= MOST_SCALE:
        raise wrong("softcap", options.softcap, "0 (none) to 1e38")
    if options.sinks is not None:
        tensor("sinks", options.sinks, q, (torch.float32, q.dtype), sizes, "n_q")
        _contiguous("sinks", options.sinks)
    for name in ("kv_start", "kv_end"):
        if (x := getattr(options, name)) is not None:
            per_entry(name, x, q, sizes)
    if not 0 <= options.dropout_p < 1:
        raise wrong("dropout_p", options.dropout_p, "a probability in [0, 1)")
    if not 0 <= options.offset < 2**32:
        raise wrong("offset", options.offset, "an integer from 0 to 2**32 - 1")


# ---- caches ----------------------------------------------------------------------------------------------------------


class CacheSizes(NamedTuple):
    """Head counts, dimensions and size of a cache."""

    n_k: int
    n_v: int
    d_k: int
    d_v: int
    pages: int
    page_size: int
    capacity: int  # tokens that an entry can hold


def _blocks(block_table: Tensor, needed: Tensor, pages: int) -> None:
    """needed: bool `[b, max_blocks]`, the entries that will be looked up."""
    values("block_table", block_table[needed], 0, pages - 1, f"0 to {pages - 1}, a block of the pool")


def blocks_of_tokens(block_table: Tensor, page_size: int, start: Tensor | None, end: Tensor, pages: int) -> None:
    """Checks the blocks that hold a token of [start, end) of each entry."""
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    needed = first < end[:, None]
    if start is not None:
        needed = needed & (first + page_size > start[:, None]) & (start < end)[:, None]
    _blocks(block_table, needed, pages)


def _cache(like: Tensor, batch: int, k_cache: Tensor, v_cache: Tensor, table: Tensor | None, k_layout: int):
    if k_layout not in (ROWS, PANELS):
        raise wrong("k_layout", k_layout, "0 (rows) or 1 (panels)")
    sizes = Sizes(b=batch)
    first = "b" if table is None else "blocks"
    _rows("v_cache", v_cache, like, sizes, f"{first} G s n_v/G d_v")
    page_size, groups = sizes["s"], sizes["G"]
    if k_layout == ROWS:
        _rows("k_cache", k_cache, like, sizes, f"{first} G s n_k/G d_k")
        n_k, d_k = groups * sizes["n_k/G"], sizes["d_k"]
    else:
        pairs = like.dtype == torch.bfloat16
        sizes["ceil(s/32)"] = -(-page_size // PANEL_TOKENS)
        _rows("k_cache", k_cache, like, sizes, f"{first} n_k ceil(s/32) {'d_k/2 32 2' if pairs else 'd_k 32'}")
        n_k, d_k = sizes["n_k"], 2 * sizes["d_k/2"] if pairs else sizes["d_k"]
        strides = (2 * PANEL_TOKENS, 2, 1) if pairs else (PANEL_TOKENS, 1)
        if k_cache.numel() and k_cache.stride()[3:] != strides:
            raise wrong("k_cache", f"strides {list(k_cache.stride())}", f"{list(strides)} inside a panel")
    n_v, d_v = groups * sizes["n_v/G"], sizes["d_v"]
    _head_dim("k_cache", d_k)
    _head_dim("v_cache", d_v)
    for name, n in (("k_cache", n_k), ("v_cache", n_v)):
        if n < 1:
            raise wrong(name, f"{n} heads", "at least 1")
    if groups != gcd(n_k, n_v):
        want = f"gcd(n_k, n_v) = {gcd(n_k, n_v)} groups"
        raise wrong("v_cache", f"{groups} groups for {n_k} K and {n_v} V heads", want)
    capacity = page_size
    if table is not None:
        tensor("block_table", table, like, (torch.int32,), sizes, "b max_blocks")
        _unit_last_stride("block_table", table)
        multiple = PANEL_TOKENS if k_layout == PANELS else 1
        if page_size < 1 or page_size % multiple != 0:
            raise wrong("v_cache", f"block size {page_size}", f"a multiple of {multiple}")
        capacity = sizes["max_blocks"] * page_size
    return CacheSizes(n_k, n_v, d_k, d_v, sizes[first], page_size, capacity)


def _v_stats(v_stats: Tensor | None, like: Tensor, batch: int, cache: CacheSizes) -> None:
    if v_stats is None:
        return
    sizes = Sizes({"b": batch, "n_v": cache.n_v, "d_v+1": cache.d_v + 1})
    tensor("v_stats", v_stats, like, (torch.float32,), sizes, "b n_v d_v+1")
    _contiguous("v_stats", v_stats)


def _has_memory(x: Tensor) -> bool:
    """Whether x is a plain tensor: not fake, functional or mapped."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" and not wrapped


def memory(written: dict[str, Tensor | None], read: dict[str, Tensor]) -> None:
    """Checks that every element of what is written has a place of its own; interleaved tensors are believed."""
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


# ---- ops -------------------------------------------------------------------------------------------------------------


def _training_heads(sizes: Sizes) -> None:
    _head_dim("q", sizes["d_k"])
    _head_dim("v", sizes["d_v"])
    heads("k", sizes["n_k"], sizes["n_q"])
    heads("v", sizes["n_v"], sizes["n_q"])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Sizes:
    sizes = Sizes()
    _rows("q", q, q, sizes, "b n_q s_q d_k", TRAINING_DTYPES)
    _rows("k", k, q, sizes, "b n_k s_k d_k")
    _rows("v", v, q, sizes, "b n_v s_k d_v")
    _training_heads(sizes)
    attention_options(q, sizes, options)
    return sizes


def cu_seqlens_values(which: str, x: Tensor, total: int, longest: int) -> None:
    """Checks cu_seqlens_q or cu_seqlens_k of a tensor of `total` rows; longest: the max_seqlen that belongs to it."""
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
    options: AttentionOptions,
) -> Sizes:
    sizes = Sizes()
    _rows("q", q, q, sizes, "total_q n_q d_k", TRAINING_DTYPES)
    _rows("k", k, q, sizes, "total_k n_k d_k")
    _rows("v", v, q, sizes, "total_k n_v d_v")
    _training_heads(sizes)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        tensor(name, x, q, (torch.int32,), sizes, "b+1")
        if x.shape[0] < 1:
            raise wrong(name, "shape [0]", "[b+1]")
        _contiguous(name, x)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            raise wrong(name, value, "an integer >= 0")
    cu_seqlens_values("q", cu_seqlens_q, sizes["total_q"], max_seqlen_q)
    cu_seqlens_values("k", cu_seqlens_k, sizes["total_k"], max_seqlen_k)
    sizes["b"] = sizes["b+1"] - 1
    attention_options(q, sizes, options)
    return sizes


def _gradients(
    q: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sizes: Sizes, of_out: str, of_lse: str
) -> None:
    wide = (torch.promote_types(q.dtype, torch.float32),)
    tensor("dout", dout, q, (q.dtype,), sizes, of_out)
    tensor("out", out, q, (q.dtype,), sizes, of_out)
    _unit_last_stride("out", out)
    if dlse is not None:
        tensor("dlse", dlse, q, wide, sizes, of_lse)
    tensor("lse", lse, q, wide, sizes, of_lse)
    _contiguous("lse", lse)


def flash_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> None:
    sizes = flash_attention(q, k, v, options)
    _gradients(q, dout, dlse, out, lse, sizes, "b n_q s_q d_v", "b n_q s_q")


def flash_attention_varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> None:
    packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    sizes = flash_attention_varlen(q, k, v, *packed, options)
    _gradients(q, dout, dlse, out, lse, sizes, "total_q n_q d_v", "n_q total_q")


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, options: DecodeOptions
) -> CacheSizes:
    sizes = Sizes()
    _rows("q", q, q, sizes, "b n_q s_q d_k")
    start, table = options.cache_start, options.block_table
    cache = _cache(q, sizes["b"], k_cache, v_cache, table, options.k_layout)
    if cache.d_k != sizes["d_k"]:
        raise wrong("q", f"head dimension {sizes['d_k']}", f"that of k_cache, {cache.d_k}")
    heads("k_cache", cache.n_k, sizes["n_q"])
    heads("v_cache", cache.n_v, sizes["n_q"])
    per_entry("cache_seqlens", cache_seqlens, q, sizes)
    values("cache_seqlens", cache_seqlens, 0, cache.capacity, f"0 to the cache's {cache.capacity} tokens")
    if start is not None:
        per_entry("cache_start", start, q, sizes)
        values("cache_start", start, 0, torch.iinfo(torch.int32).max, "0 or more")
    if table is not None and readable(table):
        blocks_of_tokens(table, cache.page_size, start, cache_seqlens, cache.pages)
    attention_options(q, sizes, shared(options, AttentionOptions))
    return cache


def selective_v_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, top_k: int, options: SelectiveVOptions
) -> CacheSizes:
    if options.max_error is not None and not options.max_error >= 0:
        raise wrong("max_error", options.max_error, "a number >= 0")
    for name, value, least in (
        ("top_k", top_k, 1),
        ("keep_first", options.keep_first, 0),
        ("keep_last", options.keep_last, 0),
    ):
        if value < least:
            raise wrong(name, value, f"an integer >= {least}")
    if options.tail not in (0, 1, 2):
        raise wrong("tail", options.tail, "0 (drop), 1 (renorm) or 2 (mean)")
    cache = decode_attention(q, k_cache, v_cache, cache_seqlens, shared(options, DecodeOptions))
    most = max(cache.capacity, MOST_INDICES // max(1, q.shape[:3].numel()))
    if options.return_indices and top_k > most:
        raise wrong("top_k", top_k, f"1 to {most} where indices are asked for")
    _v_stats(options.v_stats, q, q.shape[0], cache)
    return cache


def _rope(k: Tensor, sizes: Sizes, cos: Tensor | None, sin: Tensor | None) -> None:
    if (cos is None) != (sin is None):
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise wrong(missing, None, f"a tensor, as {given} is given")
    if cos is None:
        return
    batch, s_new, d_k = sizes["b"], sizes["s_new"], sizes["d_k"]
    for name, x in (("cos", cos), ("sin", sin)):
        _kind(name, x, k, (torch.float32, k.dtype))
        fits = x.dim() == 3 and x.shape[0] in (1, batch) and x.shape[1] == s_new
        if not fits or x.shape[2] % 2 != 0 or x.shape[2] > d_k:
            raise wrong(name, f"shape {list(x.shape)}", f"[{batch} or 1, {s_new}, an even number <= {d_k}]")
        _unit_last_stride(name, x)
    if sin.dtype != cos.dtype:
        raise wrong("sin", f"dtype {_dtype_name(sin.dtype)}", f"{_dtype_name(cos.dtype)}, that of cos", TypeError)
    if sin.shape != cos.shape:
        raise wrong("sin", f"shape {list(sin.shape)}", f"the shape of cos = {list(cos.shape)}")
    if sin.stride() != cos.stride():
        raise wrong("sin", f"strides {list(sin.stride())}", f"{list(cos.stride())}, those of cos")


def kv_cache_update(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, options: UpdateOptions
) -> CacheSizes:
    _kind("k_cache", k_cache, k_cache, DTYPES)
    _rows("k", k, k_cache, Sizes(), "b n_k s_new d_k")
    batch, table = k.shape[0], options.block_table
    cache = _cache(k_cache, batch, k_cache, v_cache, table, options.k_layout)
    sizes = Sizes(b=batch, n_k=cache.n_k, d_k=cache.d_k, n_v=cache.n_v, d_v=cache.d_v)
    sizes.check("k", k, "b n_k s_new d_k")
    _rows("v", v, k_cache, sizes, "b n_v s_new d_v")
    tensor("positions", positions, k, (torch.int32, torch.int64), sizes, "b s_new")
    _rope(k, sizes, options.cos, options.sin)
    _v_stats(options.v_stats, k, batch, cache)
    memory({"k_cache": k_cache, "v_cache": v_cache, "v_stats": options.v_stats}, {"k": k, "v": v})
    values("positions", positions, -1, cache.capacity - 1, f"-1 (skip) or 0 to {cache.capacity - 1}")
    if table is not None and readable(table):
        needed = torch.zeros_like(table, dtype=torch.bool)
        entry, token = (positions >= 0).nonzero(as_tuple=True)
        needed[entry, positions[entry, token].long() // cache.page_size] = True
        _blocks(table, needed, cache.pages)
    return cache


def swiglu(gate: Tensor, up: Tensor) -> None:
    _elementwise(gate=gate, up=up)


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    _elementwise(gate=gate, up=up, dout=dout)


def _elementwise(gate: Tensor, **others: Tensor) -> None:
    _kind("gate", gate, gate, DTYPES)
    for name, x in others.items():
        _kind(name, x, gate, (gate.dtype,))
        if x.shape != gate.shape:
            raise wrong(name, f"shape {list(x.shape)}", f"the shape of gate = {list(gate.shape)}")


# ---- the schemas' signatures -----------------------------------------------------------------------------------------


def checked(function: Callable) -> Callable:
    """function(*tensors, options), called as its op is: the arguments are checked first, by the check of its name.

    Keywords of its own go through; `cache`, if it takes that, is what the check returns.
    """
    check = getattr(sys.modules[__name__], function.__name__)
    leading = [name for name in signature(check).parameters if name != "options"]
    options_type = get_type_hints(check).get("options")
    own = [x.name for x in signature(function).parameters.values() if x.kind == x.KEYWORD_ONLY]

    @wraps(function)
    def kernel(*args: Any, **named: Any) -> Any:
        keywords = {name: named.pop(name) for name in own if name in named}
        given = [*args[: len(leading)], *(named.pop(name) for name in leading[len(args) :])]
        if options_type is not None:
            given.append(options_type(*args[len(leading) :], **named))
        result = check(*given)
        if "cache" in own:
            keywords["cache"] = result
        return function(*given, **keywords)

    return kernel
