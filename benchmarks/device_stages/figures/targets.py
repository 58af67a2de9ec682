"""What each line should reach. Records of others are those published for these shapes; see `Target.source`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MB = 1e6


class Target(NamedTuple):
    section: str
    column: str  # of the line
    sign: str
    value: float
    unit: str
    applies: Callable[[dict], bool]
    source: str = ""


def _peers(section: str) -> list[Target]:
    def faster_than(peer: str) -> Target:
        return Target(section, f"ours / {peer}", "<", 1.0, "", lambda line: True)

    return [faster_than(peer) for peer in ("cuDNN", "flash", "flash_attn", "flashinfer")]


def _long(dims: str) -> Callable[[dict], bool]:
    return lambda line: line["dims"] == dims and line["tokens"] >= 8192


TARGETS = [
    Target("decode", "of read", "≥", 0.88, "", lambda line: line["MB"] * MB >= 64e6),
    Target("decode", "µs", "≤", 8.0, "µs", lambda line: (line["batch"], line["tokens"]) == (1, 4096)),
    Target("decode", "less than own GQA-16", "≥", 0.30, "", lambda line: 4096 <= line["tokens"] < 16384),
    Target("decode", "less than own GQA-16", "≥", 0.36, "", lambda line: line["tokens"] >= 16384),
    *_peers("decode"),
    Target("prefill", "TFLOP/s", "≥", 473, "TFLOP/s", _long("64/64"), "FA3 on an H100"),
    Target("prefill", "TFLOP/s", "≥", 688, "TFLOP/s", _long("128/128"), "cuDNN 9.19 on an H200"),
    Target("prefill", "TFLOP/s", "≥", 560, "TFLOP/s", _long("64/128"), "no overlap of softmax and products"),
    *_peers("prefill"),
    Target("backward", "TFLOP/s", "≥", 468, "TFLOP/s", _long("64/64"), "FA3 on an H100"),
    Target("backward", "TFLOP/s", "≥", 581, "TFLOP/s", _long("128/128"), "cuDNN 9.19 on an H200"),
    Target("backward", "TFLOP/s", "≥", 450, "TFLOP/s", _long("64/128")),
    *_peers("backward"),
    Target("selective", "times own dense", "≥", 2.0, "", lambda line: (line["batch"], line["tokens"]) == (1, 32768)),
    Target("selective", "times own dense", "≥", 4.0, "", lambda line: line["batch"] * line["tokens"] >= 512 * 1024),
    # Never slower: short caches are for the dense kernel.
    Target("selective", "times own dense", "≥", 0.98, "", lambda line: line["batch"] * line["tokens"] < 32768),
]


def judged(section: str, line: dict) -> list[dict]:
    """The targets of a line with what it reached, `met` or not."""
    verdicts = []
    for target in TARGETS:
        value = line.get(target.column)
        if target.section == section and value is not None and target.applies(line):
            met = value >= target.value if target.sign == "≥" else value <= target.value
            text = f"{target.column} {target.sign} {target.value:g}{' ' * bool(target.unit)}{target.unit}"
            text += f" ({target.source})" if target.source else ""
            verdicts.append({"target": text, "reached": value, "met": met})
    return verdicts
