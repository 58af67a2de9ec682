"""The README says what is true: what runs on a GPU, how fast things are, how long it is itself."""

import json
import re
import runpy

import pytest
from helpers import WITHOUT_CUDA_KERNEL
from pages import PAGES
from paths import ROOT

from diffqkv._version import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from diffqkv.ops import dispatch

README = PAGES["README.md"]


def test_a_newcomer_reads_it_in_one_go():
    assert len(README.splitlines()) <= 170


def test_no_kernel_is_claimed_to_run_on_a_gpu_that_has_not():
    rows = re.findall(r"^\| (`\w+`.*?) \| kernel, tested \| (.+) \|$", README, re.MULTILINE)
    named = {op: cell for ops, cell in rows for op in re.findall(r"`(\w+)`", ops)}
    assert set(named) == set(dispatch.OPS)
    for op, cell in named.items():
        if op in WITHOUT_CUDA_KERNEL:
            assert cell == "plain torch"
        else:
            assert ("compiled, not run on a GPU" in cell) == (op not in dispatch.CUDA_TESTED), op


def test_releases_of_transformers():
    assert f"transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}\n" in README


# The table's rows: the case of the benchmark, tokens, and the ratio that the row tells. A name that stands on two rows
# has a ratio for each.
MEASURED = {
    "`flash_attention`, 2048 tokens": ("flash_attention", 2048, "SDPA, K repeated"),
    "`flash_attention` with gradients, 2048 tokens": ("flash_attention_backward", 2048, "SDPA, K repeated"),
    "`decode_attention`, 8192 tokens": ("decode_attention", 8192, "SDPA, GQA-16", "Sigma / own GQA-16"),
    "`selective_v_attention`, 100 of 32768 V rows": ("selective_v_attention", 32768, "own dense"),
    "decode step of all of Sigma-1.5B, packed, 4096 tokens": ("model_decode", 4096, "Llama, GQA-16"),
}
RESULTS = ROOT / "benchmarks" / "results"
LINES = json.loads((RESULTS / "bench_zen4.json").read_text())["lines"]
MODELS = json.loads((RESULTS / "models_zen4.json").read_text())["lines"]


def line_of(case: str, tokens: int, dtype: str, weights: str = "packed") -> dict:
    (line,) = (
        line
        for line in (MODELS if case.startswith("model_") else LINES)
        if (line["case"], line["tokens"], line["dtype"], line["batch"]) == (case, tokens, dtype, 1)
        and line.get("weights", weights) == weights
        and not line["prompt"]
    )
    return line


def ratio(case: str, tokens: int, dtype: str, column: str) -> float:
    return line_of(case, tokens, dtype)["ratios"][column]


def test_speeds_are_those_of_the_committed_run():
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) .*? \| ([\d.]+) .*? \| .+ \|$", README, re.MULTILINE)
    assert {row[0] for row in rows} == set(MEASURED) and len(rows) == 1 + len(MEASURED)
    seen: dict[str, int] = {}
    for name, *printed in rows:
        case, tokens, *columns = MEASURED[name]
        column = columns[seen.setdefault(name, 0)]
        seen[name] += 1
        assert printed == [f"{ratio(case, tokens, dtype, column):.2f}" for dtype in ("float32", "bfloat16")], name
    words = " ".join(README.split())
    for form, name in (("packed", "16 bits"), ("int8", "8 bits"), ("int4", "4 bits")):
        long, short = (line_of("model_decode", tokens, "bfloat16", form) for tokens in (16384, 16))
        speeds = [line["figures"]["tokens/s"]["ours"] for line in (short, long)]
        factors = [line["ratios"]["llama.cpp"] for line in (short, long)]
        row = f"| {speeds[0]:.1f}, {factors[0]:.2f} times | {speeds[1]:.1f}, {factors[1]:.2f} times |"
        assert f"| {name} {row}" in words
    reads = {
        dtype: [100 * x["ratios"]["of limit"] for x in LINES if (x["case"], x["dtype"]) == ("decode_attention", dtype)]
        for dtype in ("float32", "bfloat16")
    }
    for (low, high), of_limit in zip(
        re.findall(r"(\d+)\s+to\s+(\d+) %", README.partition("## How fast")[2]), reads.values(), strict=True
    ):
        assert (round(min(of_limit)), round(max(of_limit))) == (int(low), int(high))


@pytest.mark.parametrize("name", ["head_map"])
def test_picture_is_that_of_its_script(name):
    script = runpy.run_path(str(ROOT / "scripts" / f"draw_{name}.py"))
    assert (ROOT / "docs" / f"{name}.svg").read_text() == script["picture"]()
