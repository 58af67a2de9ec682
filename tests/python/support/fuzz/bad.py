"""Random calls with one wrong argument: the right exception, with the argument's name, and nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffqkv

from .draw import DTYPES, Draw, int32

MESSAGE = re.compile(r"^(\w+): got .+, want .+", re.DOTALL)
INF, NAN = float("inf"), float("nan")
NUMBERS: dict[str, list[Any]] = {
    "softmax_scale": ["1", [], INF, -INF, NAN, 1e39],
    "softcap": ["1", None, -1.0, -1e-30, INF, NAN],
    "window": [None, 3, (1,), (1, 2, 3), (-2, 0), (0, -2), (1.5, 0), (True, 0), ("1", 0), (-(2**63), 0), (2**63, 0)],
    "dropout_p": ["0", None, 1.0, 1.5, -0.1, NAN, INF],
    "seed": ["0", 0.5, 2**63, True],
    "offset": ["0", None, -1, 2**32, 0.5],
    "top_k": [0, -1, -(2**62), 1.0, None, "1", True],
    "tail": ["", "none", 0, None],
    "max_error": [-1.0, -1e-30, NAN, "1", True],
    "keep_first": [-1, 1.0, None],
    "keep_last": [-1, 1.0, None],
    "k_layout": ["", "row", 0, None],
    "max_seqlen_q": [-1, 0, 1.5, None, "4"],
    "max_seqlen_k": [-1, 0, 1.5, None, "4"],
    "out_features": [0, -1, 1.5, None, "4", True, 2**62, 2**63, 32, 65],
    "eps": [-1.0, -1e-30, NAN, "1", None, True],
}


def _training(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "softmax_scale": None,
        "softcap": 0.0,
        "window": (-1, -1),
        "dropout_p": 0.5,
        "seed": 1,
        "offset": 0,
        "kv_start": int32([0, 1]),
        "kv_end": int32([3, 2]),
        "sinks": d.tensor(8, dtype=dtype),
    }


def _flash(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 8, 3, 16), "k": (2, 2, 5, 16), "v": (2, 4, 5, 24)}
    return {name: d.tensor(*shape, dtype=dtype) for name, shape in shapes.items()} | _training(d, dtype)


def _varlen(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (7, 8, 16), "k": (9, 2, 16), "v": (9, 4, 24)}
    lengths = {"cu_seqlens_q": int32([0, 3, 7]), "cu_seqlens_k": int32([0, 4, 9]), "max_seqlen_q": 4, "max_seqlen_k": 5}
    return {name: d.tensor(*shape, dtype=dtype) for name, shape in shapes.items()} | lengths | _training(d, dtype)


def _cache(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    layout, paged = d.choice("rows", "panels"), d.chance(0.5)
    pages, k_shape = 6 if paged else 2, (2, 64, 1, 16)
    if layout == "panels":
        k_shape = (2, 2, 8, 32, 2) if dtype == torch.bfloat16 else (2, 2, 16, 32)
    arguments = {
        "k_cache": d.tensor(pages, *k_shape, dtype=dtype),
        "v_cache": d.tensor(pages, 2, 64, 2, 24, dtype=dtype),
        "k_layout": layout,
    }
    return arguments | ({"block_table": torch.tensor([[0, 3], [5, 1]], dtype=torch.int32)} if paged else {})


def _decode(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    lengths = {"cache_seqlens": int32([64, 10]), "cache_start": int32([0, 3]), "softmax_scale": None}
    return {"q": d.tensor(2, 8, d.choice(1, 3, 17), 16, dtype=dtype)} | _cache(d, dtype) | lengths


def _decode_attention(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    return _decode(d, dtype) | {"window": (-1, -1), "softcap": 0.0, "sinks": d.tensor(8, dtype=dtype)}


def _selective(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    numbers = {
        "top_k": 4,
        "tail": d.choice("drop", "renorm", "mean"),
        "max_error": 0.5,
        "keep_first": 0,
        "keep_last": 1,
    }
    return _decode(d, dtype) | numbers | {"v_stats": d.tensor(2, 4, 25).abs()}


def _update(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    positions = torch.tensor([[0, 5, -1], [7, 6, 40]], dtype=d.choice(torch.int32, torch.int64))
    rotation = {"cos": d.tensor(2, 3, 8), "sin": d.tensor(2, 3, 8)} if d.chance(0.5) else {}
    new = {"k": d.tensor(2, 2, 3, 16, dtype=dtype), "v": d.tensor(2, 4, 3, 24, dtype=dtype), "positions": positions}
    return _cache(d, dtype) | new | rotation | {"v_stats": d.tensor(2, 4, 25).abs()}


def _swiglu(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    return {"gate": d.tensor(3, 5, dtype=dtype), "up": d.tensor(3, 5, dtype=dtype)}


def _packed_linear(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    form = d.choice(dtype, torch.int8, torch.uint8)
    shape = {torch.int8: (32, 32, 2), torch.uint8: (8, 32, 4), torch.bfloat16: (32, 32, 2)}.get(form, (64, 32))
    arguments = {
        "x": d.tensor(2, 3, 64, dtype=dtype),
        "weight": d.tensor(2, *shape).to(form) if form == dtype else torch.ones(2, *shape, dtype=form),
        "out_features": 50,
        "bias": d.tensor(50, dtype=dtype),
    }
    if form == dtype:
        return arguments
    return arguments | {name: d.tensor(2, 2, 32, dtype=dtype) for name in ("scales", "zeros")}


def _rms_norm(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": d.tensor(3, 5, dtype=dtype), "weight": d.tensor(5, dtype=dtype), "eps": 1e-6}


def _rotary_embedding(d: Draw, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": d.tensor(2, 3, 4, 8, dtype=dtype), "cos": d.tensor(2, 3, 8), "sin": d.tensor(2, 3, 8)}


# ---- faults ----------------------------------------------------------------------------------------------------------

OPTIONAL = {"kv_start", "kv_end", "sinks", "cache_start", "block_table", "v_stats", "cos", "sin", "zeros", "bias"}
INDICES = {
    "kv_start",
    "kv_end",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cache_seqlens",
    "cache_start",
    "block_table",
    "positions",
}
WRITTEN = ("k_cache", "v_cache", "v_stats")


def _wrong_tensor(d: Draw, name: str, x: Tensor, of: dict[str, Any]) -> Any:
    """x, or what is like it, such that the op must refuse it among the other arguments."""
    others = ["dtype", "rank", "type", "device"]
    if "k_cache" in of and name in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin"):
        others.append("gradient")
    if "weight" in of and "eps" not in of:
        if x.is_floating_point():
            others.append("gradient")
        others += ["last size"] if name == "x" else ["size", "stride"]
        if name == "x":  # one of any dimensions, and of any strides
            others.remove("rank")
        return _fault(d, d.random.choice(others), name, x, of)
    if name not in INDICES and name not in ("sinks", "v_stats", "gate", "up", "weight") and "eps" not in of:
        others += ["last stride", "last size"]
    if "eps" in of or "x" in of:
        others.append("gradient")
    if name == "weight":
        others += ["size", "stride"]
    if name == "x" and "eps" in of:
        others.remove("rank")
    if name in (
        "kv_start",
        "kv_end",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "cache_seqlens",
        "cache_start",
        "sinks",
        "v_stats",
    ):
        others += ["size", "stride"]
    if name in ("cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "cache_start", "block_table", "positions"):
        others.append("values")
    return _fault(d, d.random.choice(others), name, x, of)


def _fault(d: Draw, fault: str, name: str, x: Tensor, of: dict[str, Any]) -> Any:
    d.note(fault=fault)
    if fault == "dtype":
        right = {x.dtype}
        if name == "positions":
            right = {torch.int32, torch.int64}
        elif name in ("weight", "scales") and "eps" not in of:
            right = {of["x"].dtype, torch.int8, torch.uint8} if name == "weight" else set(DTYPES)
        elif name in ("sinks", "cos", "sin"):
            right = {torch.float32, of[next(n for n in ("q", "k", "x") if n in of)].dtype}
        elif name in ("x", "weight"):
            right = {*DTYPES} if name == "x" else {torch.float32, x.dtype}
        every = [
            *DTYPES,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.int16,
            torch.uint8,
            torch.bool,
            torch.complex64,
        ]
        return x.to(d.random.choice([dtype for dtype in every if dtype not in right]))
    if fault == "rank":
        return d.choice(x[None], x[..., None], x.flatten()[0])
    if fault == "type":
        wrong = [x.tolist(), 3, "x", x.numpy() if x.dtype != torch.bfloat16 else 1.5]
        return d.random.choice(wrong if name in OPTIONAL else [*wrong, None])
    if fault == "device":
        return x.to("meta")
    if fault == "gradient":
        return x.clone().requires_grad_()
    if fault == "last stride":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    if fault == "last size":
        return x[..., :-1]
    if fault == "size":
        return torch.cat([x, x[:1]])
    if fault == "stride":
        return torch.stack([x, x], dim=-1)[..., 0]
    x = x.clone()
    if name.startswith("cu_seqlens"):
        x[d.integer(0, 2)] += d.choice(-100, 100)
    elif name == "cache_start":
        x[d.integer(0, 1)] = d.choice(-1, -(2**31))
    elif name == "block_table":
        x[:, 0] = d.choice(-1, 6, 2**31 - 1, -(2**31))
    elif name == "cache_seqlens":
        x[d.integer(0, 1)] = d.choice(-1, 129, 2**31 - 1, -(2**31))
    else:
        x[d.integer(0, 1), d.integer(0, 2)] = d.choice(-2, 128, 2**31 - 1, -(2**31))
    return x


def _call(build: Callable, function: Callable, d: Draw) -> None:
    dtype = d.random.choice(DTYPES)
    right = build(d, dtype)
    name = d.random.choice([name for name, x in right.items() if isinstance(x, Tensor) or name in NUMBERS])
    wrong = dict(right)
    value = right[name]
    wrong[name] = _wrong_tensor(d, name, value, right) if isinstance(value, Tensor) else d.random.choice(NUMBERS[name])
    got = wrong[name]
    d.note(wrong=name, value=f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got), dtype=dtype)
    before = {name: right[name].clone() for name in WRITTEN if name in right}
    try:
        function(**wrong)
    except (ValueError, TypeError, NotImplementedError) as error:
        if not MESSAGE.match(str(error)):
            raise AssertionError(
                f"{name}: the message of the {type(error).__name__} is {str(error)[:200]!r}"
            ) from error
    else:
        raise AssertionError(f"{name}: a wrong argument is taken")
    for name, x in before.items():
        if not torch.equal(right[name], x):
            raise AssertionError(f"{name} was changed by a call that raised")
    function(**right)


CALLS: dict[str, Callable[[Draw], None]] = {
    op: lambda d, build=build, op=op: _call(build, getattr(diffqkv, op), d)
    for op, build in {
        "flash_attention": _flash,
        "flash_attention_varlen": _varlen,
        "decode_attention": _decode_attention,
        "kv_cache_update": _update,
        "selective_v_attention": _selective,
        "swiglu": _swiglu,
        "packed_linear": _packed_linear,
        "rms_norm": _rms_norm,
        "rotary_embedding": _rotary_embedding,
    }.items()
}
