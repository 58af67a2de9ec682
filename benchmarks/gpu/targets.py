"""What each line should reach on an H200. Records of others are those published for these shapes."""

from __future__ import annotations

from collections.abc import Callable

from diffqkv.benchmarks.common.targets import OF_LIMIT, OURS, OVER_TWIN, OWN_DENSE, RATE, Target


def _target(
    op: str, column: str, sign: str, value: float, where: Callable[[dict], bool] = lambda record: True, source: str = ""
) -> Target:
    return Target(op, column, sign, None, value, where=where, source=source)


def _faster_than_peers(op: str) -> list[Target]:
    return [_target(op, peer, ">", 1.0) for peer in ("cuDNN", "flash", "flash_attn", "flashinfer")]


def _long(dims: str) -> Callable[[dict], bool]:
    return lambda record: record["dims"] == dims and record["tokens"] >= 8192


def _tflops(op: str, dims: str, value: float, source: str = "") -> Target:
    return _target(op, RATE, "≥", value * 1e12, _long(dims), source)


_FA3, _CUDNN = "FA3 on an H100", "cuDNN 9.19 on an H200"

TARGETS = [
    _target("decode_attention", OF_LIMIT, "≥", 0.88, lambda record: record["nbytes"] >= 64e6),
    _target("decode_attention", OURS, "≤", 8e-6, lambda record: (record["batch"], record["tokens"]) == (1, 4096)),
    _target("decode_attention", OVER_TWIN, "≤", 0.70, lambda record: 4096 <= record["tokens"] < 16384),
    _target("decode_attention", OVER_TWIN, "≤", 0.64, lambda record: record["tokens"] >= 16384),
    *_faster_than_peers("decode_attention"),
    _tflops("flash_attention", "64/64", 473, _FA3),
    _tflops("flash_attention", "128/128", 688, _CUDNN),
    _tflops("flash_attention", "64/128", 560, "no overlap of softmax and products"),
    *_faster_than_peers("flash_attention"),
    _tflops("flash_attention_backward", "64/64", 468, _FA3),
    _tflops("flash_attention_backward", "128/128", 581, _CUDNN),
    _tflops("flash_attention_backward", "64/128", 450),
    *_faster_than_peers("flash_attention_backward"),
    _target(
        "selective_v_attention", OWN_DENSE, "≥", 2.0, lambda record: (record["batch"], record["tokens"]) == (1, 32768)
    ),
    _target(
        "selective_v_attention", OWN_DENSE, "≥", 4.0, lambda record: record["batch"] * record["tokens"] >= 512 * 1024
    ),
    # Never slower: short caches are for the dense kernel.
    _target(
        "selective_v_attention", OWN_DENSE, "≥", 0.98, lambda record: record["batch"] * record["tokens"] < 32 * 1024
    ),
]
