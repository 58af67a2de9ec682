"""What each line should reach on an H200. Records of others are those published for these shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from diffqkv.benchmarks.common.targets import OF_LIMIT, OURS, OVER_TWIN, OWN_DENSE, RATE, Target


def _target(op: str, column: str, sign: str, value: float, where: Callable[[dict], bool], source: str = "") -> Target:
    return Target(op, column, sign, None, value, where=where, source=source)


def _faster_than_peers(op: str) -> list[Target]:
    return [_target(op, x, ">", 1.0, lambda record: True) for x in ("cuDNN", "flash", "flash_attn", "flashinfer")]


def _tflops(op: str, dims: str, value: float, source: str = "") -> Target:
    return _target(op, RATE, "≥", value * 1e12, lambda x: x["dims"] == dims and x["tokens"] >= 8192, source)


_decode, _selective = partial(_target, "decode_attention"), partial(_target, "selective_v_attention", OWN_DENSE, "≥")
_forward, _backward = partial(_tflops, "flash_attention"), partial(_tflops, "flash_attention_backward")

TARGETS = [
    _decode(OF_LIMIT, "≥", 0.88, lambda x: x["nbytes"] >= 64e6),
    _decode(OURS, "≤", 8e-6, lambda x: (x["batch"], x["tokens"]) == (1, 4096)),
    _decode(OVER_TWIN, "≤", 0.70, lambda x: 4096 <= x["tokens"] < 16384),
    _decode(OVER_TWIN, "≤", 0.64, lambda x: x["tokens"] >= 16384),
    *_faster_than_peers("decode_attention"),
    _forward("64/64", 473, "FA3 on an H100"),
    _forward("128/128", 688, "cuDNN 9.19 on an H200"),
    _forward("64/128", 560, "no overlap of softmax and products"),
    *_faster_than_peers("flash_attention"),
    _backward("64/64", 468, "FA3 on an H100"),
    _backward("128/128", 581, "cuDNN 9.19 on an H200"),
    _backward("64/128", 450),
    *_faster_than_peers("flash_attention_backward"),
    _selective(2.0, lambda x: (x["batch"], x["tokens"]) == (1, 32768)),
    _selective(4.0, lambda x: x["batch"] * x["tokens"] >= 512 * 1024),
    # Never slower: short caches are for the dense kernel.
    _selective(0.98, lambda x: x["batch"] * x["tokens"] < 32 * 1024),
]
