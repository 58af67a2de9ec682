"""Every wrong argument: an exception of the right type that names it, and nothing written."""

import os
import pickle
import traceback
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import assert_refusal, int32, linear_weights

import diffqkv
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled
from diffqkv.ops.checks import ArgumentError


def flash_arguments():
    return {
        "q": torch.randn(2, 8, 3, 16),
        "k": torch.randn(2, 2, 5, 16),
        "v": torch.randn(2, 4, 5, 24),
        "kv_start": int32(0, 0),
        "kv_end": int32(5, 5),
        "sinks": torch.randn(8),
    }


def varlen_arguments():
    return {
        "q": torch.randn(7, 8, 16),
        "k": torch.randn(9, 2, 16),
        "v": torch.randn(9, 4, 24),
        "cu_seqlens_q": int32(0, 3, 7),
        "cu_seqlens_k": int32(0, 9, 9),
        "max_seqlen_q": 4,
        "max_seqlen_k": 9,
        "kv_start": int32(0, 0),
        "kv_end": int32(9, 0),
        "sinks": torch.randn(8),
    }


def decode_arguments(layout="rows", paged=False):
    n = 6 if paged else 2
    k_cache = torch.randn(n, 2, 64, 1, 16) if layout == "rows" else torch.randn(n, 2, 2, 16, 32)
    return {
        "q": torch.randn(2, 8, 1, 16),
        "k_cache": k_cache,
        "v_cache": torch.randn(n, 2, 64, 2, 24),
        "cache_seqlens": int32(64, 10),
        "cache_start": int32(0, 3),
        "block_table": torch.tensor([[0, 3], [5, 1]], dtype=torch.int32) if paged else None,
        "k_layout": layout,
    }


def selective_arguments():
    return decode_arguments() | {"top_k": 4, "v_stats": torch.zeros(2, 4, 25)}


def update_arguments(layout="rows", paged=False):
    cache = decode_arguments(layout, paged)
    return {
        "k_cache": cache["k_cache"],
        "v_cache": cache["v_cache"],
        "k": torch.randn(2, 2, 3, 16),
        "v": torch.randn(2, 4, 3, 24),
        "positions": torch.tensor([[0, 1, 2], [5, -1, 7]]),
        "cos": torch.randn(1, 3, 16),
        "sin": torch.randn(1, 3, 16),
        "block_table": cache["block_table"],
        "v_stats": torch.zeros(2, 4, 25),
        "k_layout": layout,
    }


def packed_arguments(form="int4"):
    weights = linear_weights(form, 64, 128, zeros=True)._asdict()
    return {"x": torch.randn(2, 3, 128), "out_features": 64, "bias": torch.randn(64)} | weights


def wide(x):
    """x with a last stride of 2."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def check(function, arguments, changes, error, name):
    """function refuses the changed arguments with `name: got ..., want ...`, and changes no tensor.

    Plain torch, which checks in Python, says the same sentence as the compiled ops.
    """
    arguments = {n: changes[n](x) if callable(changes.get(n)) else changes.get(n, x) for n, x in arguments.items()} | {
        n: x for n, x in changes.items() if n not in arguments
    }
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    before = {n: x.detach().clone() for n, x in tensors.items()}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert_refusal(caught.value, error, name)
    for n, x in tensors.items():
        assert torch.equal(x.detach(), before[n]), f"{n} was written"
    with mock.patch.object(dispatch, "uses_kernel", lambda *args, **options: False), pytest.raises(error) as in_python:
        function(**arguments)
    assert str(in_python.value) == str(caught.value)


def half(x):
    return x.to(torch.bfloat16)


def double(x):
    return x.double()


LOGITS = [
    ({"window": (-2, 0)}, ValueError, "window"),
    ({"window": (0, -2)}, ValueError, "window"),
    ({"window": (1, 2, 3)}, ValueError, "window"),
    ({"window": 128}, TypeError, "window"),
    ({"window": (1.0, 2)}, TypeError, "window"),
    ({"window": (None, None)}, TypeError, "window"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"softcap": float("inf")}, ValueError, "softcap"),
    ({"softcap": float("nan")}, ValueError, "softcap"),
    ({"softcap": 1e39}, ValueError, "softcap"),
    ({"softcap": "30"}, TypeError, "softcap"),
    ({"softcap": None}, TypeError, "softcap"),
    ({"sinks": torch.zeros(8).double()}, TypeError, "sinks"),
    ({"sinks": torch.zeros(8).half()}, TypeError, "sinks"),
    ({"sinks": torch.zeros(8).long()}, TypeError, "sinks"),
    ({"sinks": torch.zeros(7)}, ValueError, "sinks"),
    ({"sinks": torch.zeros(1)}, ValueError, "sinks"),
    ({"sinks": torch.zeros(8, 1)}, ValueError, "sinks"),
    ({"sinks": torch.zeros(16)[::2]}, ValueError, "sinks"),
    ({"sinks": torch.zeros(8, device="meta")}, ValueError, "sinks"),
    ({"sinks": 0.5}, TypeError, "sinks"),
]

SCALE = [
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale"),
    ({"softmax_scale": -float("inf")}, ValueError, "softmax_scale"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale"),
    ({"softmax_scale": 1e39}, ValueError, "softmax_scale"),  # infinite in float32
]

DROPOUT = [
    ({"dropout_p": float("inf")}, ValueError, "dropout_p"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p"),
    ({"dropout_p": True}, TypeError, "dropout_p"),
    ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed"),
    ({"dropout_p": 0.1, "seed": True}, TypeError, "seed"),
    ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed"),
    ({"dropout_p": 0.1, "seed": -(2**63) - 1}, ValueError, "seed"),
    ({"dropout_p": 0.1, "offset": -1}, ValueError, "offset"),
    ({"dropout_p": 0.1, "offset": 2**32}, ValueError, "offset"),
    ({"offset": 1.0}, TypeError, "offset"),
]

FLASH = [
    ({"q": lambda x: x[0]}, ValueError, "q"),
    ({"k": lambda x: x[0]}, ValueError, "k"),
    ({"v": lambda x: x[None]}, ValueError, "v"),
    ({"q": lambda x: x.int()}, TypeError, "q"),
    ({"k": half}, TypeError, "k"),
    ({"v": double}, TypeError, "v"),
    ({"k": lambda x: x[:1]}, ValueError, "k"),
    ({"v": lambda x: x[:1]}, ValueError, "v"),
    ({"k": lambda x: x[..., :8]}, ValueError, "k"),
    ({"v": lambda x: x[:, :, :4]}, ValueError, "v"),
    ({"k": lambda x: x.repeat(1, 2, 1, 1)[:, :3]}, ValueError, "k"),
    ({"v": lambda x: x[:, :3]}, ValueError, "v"),
    ({"k": lambda x: x[:, :0]}, ValueError, "k"),
    ({"v": lambda x: x.repeat(1, 4, 1, 1)}, ValueError, "v"),
    ({"q": lambda x: x[..., :12], "k": lambda x: x[..., :12]}, ValueError, "q"),
    ({"v": lambda x: x[..., :4]}, ValueError, "v"),
    ({"v": lambda x: x[..., :0]}, ValueError, "v"),
    ({"v": lambda x: torch.randn(2, 4, 5, 264)}, ValueError, "v"),
    ({"q": wide}, ValueError, "q"),
    ({"k": wide}, ValueError, "k"),
    ({"v": wide}, ValueError, "v"),
    ({"kv_start": lambda x: x.long()}, TypeError, "kv_start"),
    ({"kv_end": lambda x: x.float()}, TypeError, "kv_end"),
    ({"kv_end": lambda x: x[:1]}, ValueError, "kv_end"),
    ({"kv_start": lambda x: x[None]}, ValueError, "kv_start"),
    ({"k": lambda x: x.to("meta")}, ValueError, "k"),
    ({"kv_end": lambda x: x.to("meta")}, ValueError, "kv_end"),
    ({"q": None}, TypeError, "q"),
    ({"k": [1.0]}, TypeError, "k"),
    ({"v": 3}, TypeError, "v"),
    ({"kv_end": 5}, TypeError, "kv_end"),
]

VARLEN = [
    ({"q": lambda x: x[None]}, ValueError, "q"),
    ({"k": lambda x: x[0]}, ValueError, "k"),
    ({"v": lambda x: x[None]}, ValueError, "v"),
    ({"q": lambda x: x.int()}, TypeError, "q"),
    ({"k": half}, TypeError, "k"),
    ({"v": double}, TypeError, "v"),
    ({"k": lambda x: x[..., :8]}, ValueError, "k"),
    ({"v": lambda x: x[:8]}, ValueError, "v"),
    ({"k": lambda x: x.repeat(1, 2, 1)[:, :3]}, ValueError, "k"),
    ({"v": lambda x: x[:, :3]}, ValueError, "v"),
    ({"k": lambda x: x[:, :0]}, ValueError, "k"),
    ({"q": lambda x: x[..., :12], "k": lambda x: x[..., :12]}, ValueError, "q"),
    ({"v": lambda x: x[..., :4]}, ValueError, "v"),
    ({"q": wide}, ValueError, "q"),
    ({"k": wide}, ValueError, "k"),
    ({"v": wide}, ValueError, "v"),
    ({"cu_seqlens_q": lambda x: x.long()}, TypeError, "cu_seqlens_q"),
    ({"cu_seqlens_k": lambda x: x.float()}, TypeError, "cu_seqlens_k"),
    ({"cu_seqlens_q": lambda x: x[None]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": lambda x: x[:0], "cu_seqlens_k": lambda x: x[:0]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": lambda x: x[:2]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_q": lambda x: x.repeat_interleave(2)[::2]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": int32(1, 3, 7)}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": int32(-1, 3, 9)}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_q": int32(0, 8, 7), "max_seqlen_q": 8}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": int32(0, -1, 9)}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_q": int32(0, 3, 6)}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": int32(0, 5, 10)}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_q": lambda x: x.to("meta")}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q"),
    ({"cu_seqlens_k": [0, 9, 9]}, TypeError, "cu_seqlens_k"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q"),
    ({"max_seqlen_k": 8}, ValueError, "max_seqlen_k"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k"),
    ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q"),
    ({"max_seqlen_k": None}, TypeError, "max_seqlen_k"),
    ({"max_seqlen_q": torch.tensor(4.0)}, TypeError, "max_seqlen_q"),
    ({"kv_start": lambda x: x.long()}, TypeError, "kv_start"),
    ({"kv_end": lambda x: x[:1]}, ValueError, "kv_end"),
    ({"kv_end": int32(9, 0, 0)}, ValueError, "kv_end"),
    ({"q": None}, TypeError, "q"),
    ({"v": 3}, TypeError, "v"),
]

DECODE = [
    ({"q": lambda x: x[0]}, ValueError, "q"),
    ({"k_cache": lambda x: x[0]}, ValueError, "k_cache"),
    ({"v_cache": lambda x: x.flatten(3)}, ValueError, "v_cache"),
    ({"q": double}, TypeError, "q"),
    ({"k_cache": half}, TypeError, "k_cache"),
    ({"v_cache": half}, TypeError, "v_cache"),
    ({"q": lambda x: x[..., :8]}, ValueError, "q"),
    ({"q": lambda x: x[:1]}, ValueError, "q|k_cache|v_cache"),
    ({"q": lambda x: x[:, :3]}, ValueError, "q|k|k_cache"),
    ({"q": lambda x: x[:, :6]}, ValueError, "q|v|v_cache"),
    ({"k_cache": lambda x: x[..., :12], "q": lambda x: x[..., :12]}, ValueError, "k_cache"),
    ({"v_cache": lambda x: x[..., :4]}, ValueError, "v_cache"),
    ({"k_cache": lambda x: x.repeat(1, 1, 1, 2, 1)}, ValueError, "k_cache|v_cache"),
    ({"k_cache": lambda x: x[:, :1]}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x[:, :, :63]}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x[:, :, :, :0]}, ValueError, "k_cache|v_cache"),
    ({"v_cache": lambda x: x[:, :, :, :0]}, ValueError, "v_cache"),
    ({"q": wide}, ValueError, "q"),
    ({"k_cache": wide}, ValueError, "k_cache"),
    ({"v_cache": wide}, ValueError, "v_cache"),
    ({"cache_seqlens": lambda x: x.long()}, TypeError, "cache_seqlens"),
    ({"cache_seqlens": lambda x: x[:1]}, ValueError, "cache_seqlens"),
    ({"cache_seqlens": lambda x: x[:, None]}, ValueError, "cache_seqlens"),
    ({"cache_seqlens": int32(65, 1)}, ValueError, "cache_seqlens"),
    ({"cache_seqlens": int32(1, -1)}, ValueError, "cache_seqlens"),
    ({"cache_start": int32(-1, 0)}, ValueError, "cache_start"),
    ({"cache_start": lambda x: x.short()}, TypeError, "cache_start"),
    ({"cache_seqlens": None}, TypeError, "cache_seqlens"),
    ({"v_cache": "cache"}, TypeError, "v_cache"),
    ({"v_cache": lambda x: x.to("meta")}, ValueError, "v_cache"),
    ({"k_layout": "columns"}, ValueError, "k_layout"),
    ({"k_layout": 1}, TypeError, "k_layout"),
    ({"q": lambda x: x.requires_grad_()}, ValueError, "q"),
    ({"v_cache": lambda x: x.requires_grad_()}, ValueError, "v_cache"),
]

PANELS = [
    ({"k_cache": lambda x: x[..., 0]}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x[..., :16]}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x[:, :, :1]}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x.mT.contiguous().mT}, ValueError, "k_cache"),
    ({"k_cache": lambda x: x[..., :12, :], "q": lambda x: x[..., :12]}, ValueError, "k_cache"),
]

PAGED = [
    ({"block_table": lambda x: x.long()}, TypeError, "block_table"),
    ({"block_table": lambda x: x[0]}, ValueError, "block_table"),
    ({"block_table": lambda x: x[:1]}, ValueError, "block_table"),
    ({"block_table": torch.tensor([[0, 6], [1, 2]], dtype=torch.int32), "cache_seqlens": int32(65, 1)}, ValueError,
     "block_table"),
    ({"block_table": torch.tensor([[0, 1], [-1, 2]], dtype=torch.int32)}, ValueError, "block_table"),
    ({"cache_seqlens": int32(129, 1)}, ValueError, "cache_seqlens"),
]  # fmt: skip

SELECTIVE = [
    ({"top_k": 0}, ValueError, "top_k"),
    ({"top_k": -3}, ValueError, "top_k"),
    ({"top_k": True}, TypeError, "top_k"),
    ({"top_k": 4.0}, TypeError, "top_k"),
    ({"top_k": "4"}, TypeError, "top_k"),
    ({"max_error": -0.1}, ValueError, "max_error"),
    ({"max_error": float("nan")}, ValueError, "max_error"),
    ({"max_error": "0.1"}, TypeError, "max_error"),
    ({"keep_first": -1}, ValueError, "keep_first"),
    ({"keep_last": 1.5}, TypeError, "keep_last"),
    ({"tail": "head"}, ValueError, "tail"),
    ({"tail": None}, TypeError, "tail"),
    ({"v_stats": half}, TypeError, "v_stats"),
    ({"v_stats": lambda x: x[0]}, ValueError, "v_stats"),
    ({"v_stats": lambda x: x[:, :3].contiguous()}, ValueError, "v_stats"),
    ({"v_stats": lambda x: x[..., :24].contiguous()}, ValueError, "v_stats"),
    ({"v_stats": wide}, ValueError, "v_stats"),
    ({"top_k": 2**40, "return_stats": True}, ValueError, "top_k"),
    ({"top_k": 2**63 - 1, "return_stats": True}, ValueError, "top_k"),
]

UPDATE = [
    ({"k": lambda x: x[0]}, ValueError, "k"),
    ({"v": lambda x: x[0]}, ValueError, "v"),
    ({"k": half}, TypeError, "k"),
    ({"v": half}, TypeError, "v"),
    ({"k_cache": half}, TypeError, "k|k_cache|v_cache"),
    ({"k": lambda x: x[:, :1]}, ValueError, "k"),
    ({"v": lambda x: x[:, :3]}, ValueError, "v"),
    ({"k": lambda x: x[..., :8]}, ValueError, "k"),
    ({"v": lambda x: x[..., :16]}, ValueError, "v"),
    ({"v": lambda x: x[:, :, :2]}, ValueError, "v"),
    ({"v": lambda x: x[:1]}, ValueError, "v"),
    ({"k": wide}, ValueError, "k"),
    ({"v": wide}, ValueError, "v"),
    ({"positions": lambda x: x.float()}, TypeError, "positions"),
    ({"positions": lambda x: x[0]}, ValueError, "positions"),
    ({"positions": lambda x: x[:, :2]}, ValueError, "positions"),
    ({"positions": torch.tensor([[0, 1, 2], [5, -1, 64]])}, ValueError, "positions"),
    ({"positions": torch.tensor([[0, 1, -2], [5, -1, 6]])}, ValueError, "positions"),
    ({"positions": torch.tensor([[0, 1, 2**40], [5, -1, 6]])}, ValueError, "positions"),
    ({"cos": None}, ValueError, "cos"),
    ({"sin": None}, ValueError, "sin"),
    ({"cos": lambda x: x[0]}, ValueError, "cos"),
    ({"cos": lambda x: x[:, :2]}, ValueError, "cos"),
    ({"cos": lambda x: x[..., :8]}, ValueError, "cos|sin"),
    ({"cos": lambda x: x[..., :7], "sin": lambda x: x[..., :7]}, ValueError, "cos"),
    ({"cos": lambda x: x.repeat(1, 1, 2), "sin": lambda x: x.repeat(1, 1, 2)}, ValueError, "cos"),
    ({"cos": lambda x: x.repeat(3, 1, 1), "sin": lambda x: x.repeat(3, 1, 1)}, ValueError, "cos"),
    ({"cos": half, "sin": half}, TypeError, "cos"),
    ({"cos": wide, "sin": wide}, ValueError, "cos"),
    ({"sin": double}, TypeError, "sin"),
    ({"sin": lambda x: x[:, :2]}, ValueError, "sin"),
    ({"cos": wide, "sin": lambda x: x[..., :8]}, ValueError, "cos"),
    ({"v_stats": double}, TypeError, "v_stats"),
    ({"v_stats": lambda x: x[:, :2]}, ValueError, "v_stats"),
    ({"positions": None}, TypeError, "positions"),
    ({"k_layout": "row"}, ValueError, "k_layout"),
    ({"k": lambda x: x.requires_grad_()}, ValueError, "k"),
    ({"v_cache": lambda x: x.to("meta")}, ValueError, "v_cache"),
]

SWIGLU = [
    ({"up": lambda x: x[:2]}, ValueError, "up"),
    ({"up": lambda x: x[0]}, ValueError, "up"),
    ({"up": half}, TypeError, "up"),
    ({"gate": double, "up": double}, TypeError, "gate"),
    ({"gate": lambda x: x.int(), "up": lambda x: x.int()}, TypeError, "gate"),
    ({"gate": 1.0}, TypeError, "gate"),
    ({"up": 1.0}, TypeError, "up"),
    ({"up": lambda x: x.to("meta")}, ValueError, "up"),
]

PACKED = [
    ({"x": double}, TypeError, "x"),
    ({"x": lambda x: x.int()}, TypeError, "x"),
    ({"x": 1.0}, TypeError, "x"),
    ({"x": None}, TypeError, "x"),
    ({"x": torch.tensor(1.0)}, ValueError, "x"),
    ({"x": lambda x: x[..., :0]}, ValueError, "x"),
    ({"x": lambda x: x[..., :127]}, ValueError, "x"),
    ({"x": lambda x: x[..., :120]}, ValueError, "x"),
    ({"x": lambda x: x.to("meta")}, ValueError, "weight"),
    ({"x": lambda x: x.requires_grad_()}, ValueError, "x"),
    ({"x": lambda x: x[..., :96]}, ValueError, "weight"),
    ({"weight": double}, TypeError, "weight"),
    ({"weight": lambda x: x.int()}, TypeError, "weight"),
    ({"weight": lambda x: x.bool()}, TypeError, "weight"),
    ({"weight": half}, TypeError, "weight"),
    ({"weight": lambda x: x.float()}, ValueError, "weight"),
    ({"weight": lambda x: x.view(torch.int8)}, ValueError, "weight"),
    ({"weight": lambda x: x[:1]}, ValueError, "weight"),
    ({"weight": lambda x: x[0]}, ValueError, "weight"),
    ({"weight": lambda x: x[..., :3]}, ValueError, "weight"),
    ({"weight": lambda x: x[:, :, :31]}, ValueError, "weight"),
    ({"weight": lambda x: x.mT.contiguous().mT}, ValueError, "weight"),
    ({"weight": lambda x: x.to("meta")}, ValueError, "weight"),
    ({"weight": lambda x: x.tolist()}, TypeError, "weight"),
    ({"weight": None}, TypeError, "weight"),
    ({"out_features": 0}, ValueError, "out_features"),
    ({"out_features": -1}, ValueError, "out_features"),
    ({"out_features": 2**63}, ValueError, "out_features"),
    ({"out_features": None}, TypeError, "out_features"),
    ({"out_features": 65}, ValueError, "weight"),
    ({"out_features": 32}, ValueError, "weight"),
    ({"out_features": 2**63 - 1}, ValueError, "weight"),
    ({"out_features": 63}, ValueError, "bias"),
    ({"scales": None}, ValueError, "scales"),
    ({"scales": None, "zeros": None}, ValueError, "scales"),
    ({"scales": double}, TypeError, "scales"),
    ({"scales": lambda x: x.int()}, TypeError, "scales"),
    ({"scales": lambda x: x[:1]}, ValueError, "scales"),
    ({"scales": lambda x: x[0]}, ValueError, "scales"),
    ({"scales": lambda x: x[..., :31]}, ValueError, "scales"),
    ({"scales": lambda x: x[:, :0]}, ValueError, "scales"),
    ({"scales": lambda x: x[:, :3].contiguous()}, ValueError, "scales"),
    ({"scales": lambda x: x.repeat(1, 2, 1)}, ValueError, "scales"),
    ({"scales": lambda x: x[:, :2].contiguous()}, ValueError, "zeros"),
    ({"scales": wide}, ValueError, "scales"),
    ({"scales": 1.0}, TypeError, "scales"),
    ({"scales": lambda x: x.to("meta")}, ValueError, "scales"),
    ({"scales": lambda x: x.requires_grad_()}, ValueError, "scales"),
    ({"zeros": lambda x: x.half()}, TypeError, "zeros"),
    ({"zeros": lambda x: x[:, :2]}, ValueError, "zeros"),
    ({"zeros": lambda x: x[:1]}, ValueError, "zeros"),
    ({"zeros": wide}, ValueError, "zeros"),
    ({"zeros": "0"}, TypeError, "zeros"),
    ({"zeros": lambda x: x.to("meta")}, ValueError, "zeros"),
    ({"zeros": lambda x: x.requires_grad_()}, ValueError, "zeros"),
    ({"bias": half}, TypeError, "bias"),
    ({"bias": lambda x: x[:63]}, ValueError, "bias"),
    ({"bias": lambda x: x[None]}, ValueError, "bias"),
    ({"bias": wide}, ValueError, "bias"),
    ({"bias": 0}, TypeError, "bias"),
    ({"bias": lambda x: x.to("meta")}, ValueError, "bias"),
    ({"bias": lambda x: x.requires_grad_()}, ValueError, "bias"),
]
LARGE_GROUPS = {
    "x": torch.randn(512),
    "weight": torch.zeros(2, 64, 32, 4, dtype=torch.uint8),
    "scales": torch.ones(2, 1, 32),
    "zeros": None,
}
PACKED.append((LARGE_GROUPS, ValueError, "scales"))
# form of the weights, and what is wrong beside them
FORMS = [
    ("own", {"scales": torch.ones(2, 4, 32), "zeros": None}, ValueError, "scales"),
    ("own", {"zeros": torch.ones(2, 4, 32)}, ValueError, "zeros"),
    ("own", {"x": half, "bias": half}, TypeError, "weight"),
    ("own", {"x": half, "bias": half, "weight": half}, ValueError, "weight"),
    ("own", {"x": lambda x: half(x)[..., :127], "bias": half, "weight": half}, ValueError, "x"),
    ("own", {"x": lambda x: x[..., :0]}, ValueError, "x"),
    ("own", {"weight": lambda x: x[:, :127]}, ValueError, "weight"),
    ("own", {"weight": lambda x: x.mT.contiguous().mT}, ValueError, "weight"),
    ("own", {"weight": lambda x: x.requires_grad_()}, ValueError, "weight"),
    ("int8", {"x": lambda x: x[..., :126]}, ValueError, "x"),
    ("int8", {"weight": lambda x: x.view(torch.uint8)}, ValueError, "weight"),
    ("int8", {"weight": lambda x: x.flatten(2)}, ValueError, "weight"),
    ("int8", {"scales": None}, ValueError, "scales"),
]


RMS_NORM = [
    ({"x": lambda x: x[0, 0]}, ValueError, "x"),
    ({"x": double}, TypeError, "x"),
    ({"x": 1.0}, TypeError, "x"),
    ({"weight": half}, TypeError, "weight"),
    ({"weight": lambda x: x[:3]}, ValueError, "weight"),
    ({"weight": lambda x: x[None]}, ValueError, "weight"),
    ({"weight": lambda x: x.repeat(2)[::2]}, ValueError, "weight"),
    ({"weight": lambda x: x.to("meta")}, ValueError, "weight"),
    ({"weight": None}, TypeError, "weight"),
    ({"eps": -1e-6}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"eps": "1"}, TypeError, "eps"),
    ({"eps": None}, TypeError, "eps"),
    ({"x": lambda x: x.requires_grad_()}, ValueError, "x"),
    ({"weight": lambda x: x.requires_grad_()}, ValueError, "weight"),
]

ROTARY_EMBEDDING = [
    ({"x": double}, TypeError, "x"),
    ({"x": lambda x: x[0]}, ValueError, "x"),
    ({"x": wide}, ValueError, "x"),
    ({"x": 1.0}, TypeError, "x"),
    ({"cos": None}, TypeError, "cos"),
    ({"cos": half}, TypeError, "cos"),
    ({"cos": lambda x: x[0]}, ValueError, "cos"),
    ({"cos": lambda x: x[:, :2]}, ValueError, "cos"),
    ({"cos": lambda x: x[..., :7], "sin": lambda x: x[..., :7]}, ValueError, "cos"),
    ({"cos": lambda x: x.repeat(1, 1, 2), "sin": lambda x: x.repeat(1, 1, 2)}, ValueError, "cos"),
    ({"cos": lambda x: x.repeat(3, 1, 1), "sin": lambda x: x.repeat(3, 1, 1)}, ValueError, "cos"),
    ({"sin": lambda x: x[..., :8]}, ValueError, "sin"),
    ({"sin": lambda x: x.repeat(1, 2, 1)[:, ::2]}, ValueError, "sin"),
    ({"sin": wide}, ValueError, "sin"),
    ({"sin": lambda x: x.to("meta")}, ValueError, "sin"),
    ({"x": lambda x: x.requires_grad_()}, ValueError, "x"),
    ({"sin": lambda x: x.requires_grad_()}, ValueError, "sin"),
]


def rotary_arguments():
    return {"x": torch.randn(2, 3, 4, 16), "cos": torch.randn(1, 3, 16), "sin": torch.randn(1, 3, 16)}


def rms_norm_arguments():
    return {"x": torch.randn(3, 4), "weight": torch.randn(4), "eps": 1e-6}


def numbered(cases):
    return pytest.mark.parametrize("changes, error, name", cases, ids=[f"{i}-{c[2]}" for i, c in enumerate(cases)])


@numbered([*FLASH, *LOGITS, *SCALE, *DROPOUT])
def test_flash(api, changes, error, name):
    check(api.flash_attention, flash_arguments(), changes, error, name)


@numbered([*VARLEN, *LOGITS, *SCALE, *DROPOUT])
def test_varlen(api, changes, error, name):
    check(api.flash_attention_varlen, varlen_arguments(), changes, error, name)


@numbered([*LOGITS, *SCALE, ({"sinks": torch.zeros(8, requires_grad=True)}, ValueError, "sinks")])
def test_decode_attention_logits(api, changes, error, name):
    check(api.decode_attention, decode_arguments(), changes, error, name)


@numbered(DECODE)
def test_decode_attention(api, changes, error, name):
    check(api.decode_attention, decode_arguments(), changes, error, name)
    check(api.selective_v_attention, selective_arguments(), changes, error, name)


@numbered(PANELS)
def test_decode_attention_panels(api, changes, error, name):
    check(api.decode_attention, decode_arguments("panels"), changes, error, name)


def test_panels_of_bfloat16_have_pairs(api):
    arguments = decode_arguments("panels")
    arguments |= {name: half(arguments[name]) for name in ("q", "k_cache", "v_cache")}
    check(api.decode_attention, arguments, {}, ValueError, "k_cache")


def test_blocks_of_panels_are_whole_panels(api):
    arguments = decode_arguments("panels", paged=True)
    changes = {"v_cache": torch.randn(6, 2, 40, 2, 24)}
    check(api.decode_attention, arguments, changes, ValueError, "k_cache|v_cache")


@numbered(PAGED)
def test_decode_attention_paged(api, changes, error, name):
    check(api.decode_attention, decode_arguments(paged=True), changes, error, name)


@numbered([*SELECTIVE, *SCALE])
def test_selective_v_attention(api, changes, error, name):
    check(api.selective_v_attention, selective_arguments(), changes, error, name)


@pytest.mark.parametrize("layout", ["rows", "panels"])
@numbered(UPDATE)
def test_kv_cache_update(api, layout, changes, error, name):
    check(api.kv_cache_update, update_arguments(layout), changes, error, name)


def overlapping(x):
    """Of x's shape, every second entry begins where the one before has its second element."""
    return x.new_zeros(2 * x.numel()).as_strided(x.shape, (1, *x.stride()[1:]))


def expanded(x):
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("how", [expanded, overlapping])
def test_written_elements_have_a_place_each(api, layout, name, how):
    check(api.kv_cache_update, update_arguments(layout), {name: how}, ValueError, name)
    arguments = decode_arguments(layout)
    arguments[name] = how(arguments[name])
    assert api.decode_attention(**arguments).isfinite().all()  # reading is another matter


def test_caches_share_no_memory(api):
    arguments = update_arguments()
    equal_heads = {"v": torch.randn(2, 2, 3, 16), "v_stats": None, "v_cache": torch.zeros(2, 2, 64, 1, 16)}
    same = arguments | equal_heads
    check(api.kv_cache_update, same | {"v_cache": same["k_cache"]}, {}, ValueError, "v_cache")
    shifted = torch.zeros(2 * 2 * 64 * 16 + 8)
    parts = {"k_cache": shifted[8:].view(2, 2, 64, 1, 16), "v_cache": shifted[:-8].view(2, 2, 64, 1, 16)}
    check(api.kv_cache_update, same | parts, {}, ValueError, "v_cache")
    check(api.kv_cache_update, arguments | {"k": arguments["k_cache"][:, :, 5:8, 0]}, {}, ValueError, "k")
    check(api.kv_cache_update, same | {"v": same["v_cache"][:, :, 5:8, 0]}, {}, ValueError, "v")
    # K and V side by side in one tensor, by token or by page, and slices of a longer cache do not meet.
    for cut in (
        lambda x: (x[..., 0, :, :], x[..., 1, :, :]),
        lambda x: (x.view(2, 2, 2, 64, 1, 16)[:, 0], x.view(2, 2, 2, 64, 1, 16)[:, 1]),
    ):
        k_cache, v_cache = cut(torch.zeros(2, 2, 64, 2, 1, 16))
        api.kv_cache_update(**same | {"k_cache": k_cache, "v_cache": v_cache})
        assert torch.equal(v_cache[0, :, :3, 0], same["v"][0]) and v_cache.count_nonzero() == 5 * 2 * 16


KINDS = {
    "nested": lambda x: torch.nested.as_nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.as_nested_tensor([x, x], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_elements_lie_in_memory_by_strides(api, kind):
    calls = {
        "flash_attention": flash_arguments(),
        "flash_attention_varlen": varlen_arguments(),
        "decode_attention": decode_arguments(paged=True),
        "selective_v_attention": selective_arguments(),
        "kv_cache_update": update_arguments(paged=True),
        "swiglu": {"gate": torch.randn(3, 4), "up": torch.randn(3, 4)},
        "packed_linear": packed_arguments(),
        "rms_norm": rms_norm_arguments(),
        "rotary_embedding": rotary_arguments(),
    }
    for op, arguments in calls.items():
        for name, x in arguments.items():
            if not isinstance(x, torch.Tensor):
                continue
            bad = KINDS[kind](x)
            with pytest.raises(TypeError, match=rf"^{name}: got a \w+ tensor, want a dense \(strided\) tensor$"):
                getattr(api, op)(**arguments | {name: bad})


@pytest.mark.parametrize("block", [-1, 6, 2**31 - 1])
def test_kv_cache_update_of_an_unmapped_block(api, block):
    table = torch.tensor([[0, 3], [5, block]], dtype=torch.int32)
    changes = {"block_table": table, "positions": torch.tensor([[0, 1, 2], [5, -1, 70]])}
    check(api.kv_cache_update, update_arguments(paged=True), changes, ValueError, "block_table")
    arguments = update_arguments(paged=True) | {"block_table": table}
    api.kv_cache_update(**arguments)  # no token needs that entry


@numbered(SWIGLU)
def test_swiglu(api, changes, error, name):
    check(api.swiglu, {"gate": torch.randn(3, 4), "up": torch.randn(3, 4)}, changes, error, name)


def check_packed(api, arguments, changes, error, name):
    check(api.packed_linear, arguments, changes, error, name)
    # The compiled op says the same of what its schema lets through.
    changed = {n: changes[n](x) if callable(changes.get(n)) else changes.get(n, x) for n, x in arguments.items()}
    tensors = [x for n, x in changed.items() if n != "out_features"]
    in_range = type(changed["out_features"]) is int and changed["out_features"] < 2**63
    required = isinstance(changed["x"], torch.Tensor) and isinstance(changed["weight"], torch.Tensor)
    mixed = len({x.device for x in tensors if isinstance(x, torch.Tensor)}) > 1
    if not (in_range and required and all(x is None or isinstance(x, torch.Tensor) for x in tensors)) or mixed:
        return
    if any(x is not None and x.requires_grad for x in tensors):
        return
    with pytest.raises(error) as caught:
        api.packed_linear(**changed)
    with pytest.raises(RuntimeError) as direct:
        torch.ops.diffqkv.packed_linear(**changed)
    assert str(caught.value) in str(direct.value)


@numbered(PACKED)
def test_packed_linear(api, library, changes, error, name):
    check_packed(api, packed_arguments(), changes, error, name)


@pytest.mark.parametrize("form, changes, error, name", FORMS, ids=[f"{i}-{c[0]}-{c[3]}" for i, c in enumerate(FORMS)])
def test_packed_linear_forms(api, library, form, changes, error, name):
    check_packed(api, packed_arguments(form), changes, error, name)


@numbered(RMS_NORM)
def test_rms_norm(api, changes, error, name):
    check(api.rms_norm, rms_norm_arguments(), changes, error, name)


@numbered(ROTARY_EMBEDDING)
def test_rotary_embedding(api, changes, error, name):
    check(api.rotary_embedding, rotary_arguments(), changes, error, name)


def test_a_wrong_value_is_both_errors_and_pickles():
    with pytest.raises(RuntimeError, match="^k: got ") as caught:
        diffqkv.flash_attention(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ArgumentError and isinstance(copy, ValueError) and str(copy) == str(caught.value)
    assert traceback.format_exception_only(copy)[0].startswith("diffqkv.ops.checks.ArgumentError: k: got ")


# op, its right arguments, and integers of each kind of argument
INTEGERS = [
    ("flash_attention", flash_arguments, {"window": (2, 1)}),
    ("flash_attention", flash_arguments, {"dropout_p": 0.5, "seed": -5, "offset": 3}),
    ("flash_attention_varlen", varlen_arguments, {"max_seqlen_q": 5, "max_seqlen_k": 10, "window": (2, 1)}),
    ("flash_attention_varlen", varlen_arguments, {"dropout_p": 0.5, "seed": 5, "offset": 3}),
    ("decode_attention", decode_arguments, {"window": (3, -1)}),
    ("selective_v_attention", selective_arguments, {"top_k": 1, "keep_first": 1, "keep_last": 2}),
    ("packed_linear", lambda: packed_arguments() | {"bias": None}, {"out_features": 63}),
]


def converted(options, make):
    """options with each integer as make(it)."""
    pairs = {n: tuple(map(make, x)) for n, x in options.items() if isinstance(x, tuple)}
    return options | {n: make(x) for n, x in options.items() if isinstance(x, int)} | pairs


@pytest.mark.parametrize("make", [np.int64, np.int16, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
@pytest.mark.parametrize("op, arguments, options", INTEGERS)
def test_integers_of_numpy_and_torch(api, op, arguments, options, make):
    function, arguments = getattr(api, op), arguments()
    want = function(**arguments | options)
    assert torch.equal(function(**arguments | converted(options, make)), want)
    assert not torch.equal(function(**arguments | converted(options, lambda x: x + 1)), want)


@pytest.mark.parametrize(
    "make",
    [
        float,
        bool,
        str,
        np.float32,
        np.bool_,
        lambda x: [x],
        lambda x: torch.tensor([x]),
        lambda x: torch.tensor(x > 0),
        lambda x: torch.tensor(float(x)),
    ],
)
@pytest.mark.parametrize("op, arguments, options", INTEGERS)
def test_what_is_no_integer(api, op, arguments, options, make):
    for name, value in options.items():
        if isinstance(value, (int, tuple)):
            check(getattr(api, op), arguments(), options | converted({name: value}, make), TypeError, name)


# op, its right arguments, and numbers of each kind of argument
NUMBERS = [
    ("flash_attention", flash_arguments, {"softmax_scale": 0.5, "softcap": 2.0}),
    ("flash_attention", flash_arguments, {"dropout_p": 0.5, "seed": 5}),
    ("flash_attention_varlen", varlen_arguments, {"softmax_scale": 0.25, "softcap": 0.5}),
    ("decode_attention", decode_arguments, {"softmax_scale": 0.25, "softcap": 0.5}),
    ("selective_v_attention", selective_arguments, {"softmax_scale": 0.25, "max_error": 0.5}),
]
NUMBER_CASES = [
    (op, arguments, options, name)
    for op, arguments, options in NUMBERS
    for name, x in options.items()
    if isinstance(x, float)
]


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor(x).double()])
@pytest.mark.parametrize("op, arguments, options, name", NUMBER_CASES)
def test_numbers_of_numpy_and_torch(api, op, arguments, options, name, make):
    function, arguments = getattr(api, op), arguments()
    want = function(**arguments | options)
    assert torch.equal(function(**arguments | options | {name: make(options[name])}), want)


@pytest.mark.parametrize("make", [str, bool, np.bool_, complex, lambda x: [x], lambda x: torch.tensor([x])])
@pytest.mark.parametrize("op, arguments, options, name", NUMBER_CASES)
def test_what_is_no_number(api, op, arguments, options, name, make):
    check(getattr(api, op), arguments(), options | {name: make(options[name])}, TypeError, name)


def test_integers_in_compiled_code():
    """A graph has no value of a tensor: outside fullgraph torch.compile leaves the call to Python."""
    q = torch.randn(1, 2, 8, 16)

    def attend(q, left):
        return diffqkv.flash_attention(q, q, q, window=(left, 0))

    compiled = torch.compile(attend, backend="aot_eager")
    assert torch.equal(compiled(q, torch.tensor(2)), attend(q, 2))
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, 2), attend(q, 2))
    with pytest.raises(Exception, match="window: got Tensor in compiled code, want an int"):
        compiled(q, torch.tensor(2))


def test_inference_ops_run_on_parameters_without_grad_mode(api):
    arguments = decode_arguments()
    arguments["q"].requires_grad_()
    with torch.no_grad():
        assert not api.decode_attention(**arguments).requires_grad
    arguments = packed_arguments("own")
    arguments |= {name: torch.nn.Parameter(arguments[name]) for name in ("weight", "bias")}
    with torch.no_grad():
        assert not api.packed_linear(**arguments).requires_grad
    with torch.inference_mode():
        assert api.packed_linear(**arguments).shape == (2, 3, 64)


DIRECT = [
    ("flash_attention", flash_arguments, {"k": torch.randn(2, 3, 5, 16)}, "k"),
    ("selective_v_attention", selective_arguments, {"tail": 3}, "tail"),
    ("decode_attention", decode_arguments, {"k_layout": 2}, "k_layout"),
    *(
        (op, arguments, changes, name)
        for op, arguments in (
            ("flash_attention", flash_arguments),
            ("flash_attention_varlen", varlen_arguments),
            ("decode_attention", decode_arguments),
        )
        for changes, name in (
            ({"window_left": -2}, "window_left"),
            ({"window_right": -2}, "window_right"),
            ({"softcap": -1.0}, "softcap"),
            ({"softcap": float("inf")}, "softcap"),
            ({"softcap": float("nan")}, "softcap"),
            ({"softmax_scale": float("inf")}, "softmax_scale"),
            ({"softmax_scale": float("nan")}, "softmax_scale"),
            ({"sinks": torch.zeros(7)}, "sinks"),
            ({"sinks": torch.zeros(16)[::2]}, "sinks"),
            ({"sinks": torch.zeros(8).double()}, "sinks"),
        )
    ),
    *(
        (op, arguments, changes, name)
        for op, arguments in (("flash_attention", flash_arguments), ("flash_attention_varlen", varlen_arguments))
        for changes, name in (
            ({"dropout_p": -0.1}, "dropout_p"),
            ({"dropout_p": 1.0}, "dropout_p"),
            ({"dropout_p": float("nan")}, "dropout_p"),
            ({"dropout_p": float("inf")}, "dropout_p"),
            ({"offset": -1}, "offset"),
            ({"offset": 2**32}, "offset"),
        )
    ),
    ("flash_attention_varlen", varlen_arguments, {"max_seqlen_q": -1}, "max_seqlen_q"),
    ("flash_attention_varlen", varlen_arguments, {"max_seqlen_q": 3}, "max_seqlen_q"),
    ("flash_attention_varlen", varlen_arguments, {"cu_seqlens_k": int32(0, 5, 10)}, "cu_seqlens_k"),
]


@pytest.mark.parametrize("op, arguments, changes, name", DIRECT, ids=[f"{c[0]}-{c[3]}" for c in DIRECT])
def test_direct_calls_raise_runtime_errors(library, op, arguments, changes, name):
    arguments = arguments() | {"k_layout": 0}
    if "k_cache" not in arguments:
        del arguments["k_layout"]
    with pytest.raises(RuntimeError, match=rf"{name}: got .+, want"):
        getattr(library, op)(**arguments | changes)


def backward_arguments(varlen):
    arguments = varlen_arguments() if varlen else flash_arguments()
    shape, lse_shape = ((7, 8, 24), (8, 7)) if varlen else ((2, 8, 3, 24), (2, 8, 3))
    return {
        "dout": torch.randn(shape),
        "dlse": torch.randn(lse_shape),
        "out": torch.randn(shape),
        "lse": torch.randn(lse_shape),
    } | arguments


BACKWARD = [
    ({"dout": half}, "dout"),
    ({"dout": lambda x: x[..., :16]}, "dout"),
    ({"dout": lambda x: x[None]}, "dout"),
    ({"out": half}, "out"),
    ({"out": lambda x: x[:1]}, "out"),
    ({"lse": double}, "lse"),
    ({"lse": lambda x: x[..., :2]}, "lse"),
    ({"dlse": half}, "dlse"),
    ({"dlse": lambda x: x[..., :2]}, "dlse"),
    ({"k": half}, "k"),
    ({"v": lambda x: x[:, :3]}, "v"),
    ({"sinks": lambda x: x[:3]}, "sinks"),
    ({"kv_end": lambda x: x[:1]}, "kv_end"),
    ({"window_left": -2}, "window_left"),
    ({"softmax_scale": float("inf")}, "softmax_scale"),
    ({"softmax_scale": float("nan")}, "softmax_scale"),
    ({"softcap": float("inf")}, "softcap"),
    ({"dropout_p": 1.0}, "dropout_p"),
    ({"dropout_p": float("nan")}, "dropout_p"),
]


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("changes, name", BACKWARD, ids=[f"{i}-{c[1]}" for i, c in enumerate(BACKWARD)])
def test_backward(library, changes, name, varlen):
    arguments = backward_arguments(varlen)
    arguments |= {n: x(arguments[n]) if callable(x) else x for n, x in changes.items()}
    op = library.flash_attention_varlen_backward if varlen else library.flash_attention_backward
    with pytest.raises(RuntimeError, match=rf"{name}: got .+, want"):
        op(**arguments)


def test_missing_library_is_explained():
    if os.environ.get("DIFFQKV_DISABLE_LIBRARY") == "1":
        assert not compiled.loaded and diffqkv.config()["reason"] == "DIFFQKV_DISABLE_LIBRARY=1"
    else:
        assert compiled.loaded, compiled.reason
        assert diffqkv.config()["reason"] is None


def test_a_library_of_an_older_version_is_refused(library, monkeypatch):
    for name in ("path", "reason", "loaded"):
        monkeypatch.setattr(compiled, name, getattr(compiled, name))
    assert compiled.kernel("op_of_tomorrow") is None
    assert compiled.path is None and not compiled.loaded and not compiled.has_kernel("swiglu", "cpu")
    why = compiled.reason
    assert why.endswith("is older than this package: it has no op_of_tomorrow; run make build")
    assert diffqkv.swiglu(torch.ones(3), torch.ones(3)).shape == (3,)  # in plain torch
