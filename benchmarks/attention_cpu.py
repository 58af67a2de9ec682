"""Prefill and decode attention of a Sigma-1.5B layer on the CPU: this library beside torch's SDPA.

    python benchmarks/attention_cpu.py [--json FILE] [--markdown FILE] [--seconds 2] [--threads N]

Contenders, in one interleaved run per line:

- ours: flash_attention (prefill), decode_attention on the panel cache that `diffqkv.Cache` keeps on CPUs (decode)
- SDPA, K repeated: torch's scaled_dot_product_attention after repeating K from 4 to 16 heads, what a user of this shape
  has to do; the repetition is part of the call
- SDPA, GQA-16: the same attention with 16 K heads, the model that the paper compares with
- matmul (decode): torch's matrix products with the q heads of a group as rows, the fastest that plain torch does with
  this shape
- limit: what the machine does in the same seconds: multiply-adds on registers (bf16 dot products where the CPU has them
  and the data is bf16) for prefill, reading memory from end to end for decode

A line whose results differ from a float64 reference by more than the tolerance gets no ratio, and the program ends
with 1. Decode walks through 512 MiB of caches, as a model does that visits its layers: a smaller working set would stay
in the L3 cache, where no layout saves anything.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from timing import interleaved

import diffqkv
from diffqkv import reference

N_Q, N_K, N_V, D = 32, 4, 16, 64
POOL_BYTES = 512 << 20
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def grouped_matmul(q, k, v):
    """Decode attention of `[1, n_q, 1, d]` by matrix products that read each K and V head once."""
    scores = q.view(1, N_K, N_Q // N_K, D) @ k.transpose(2, 3) * D**-0.5
    weights = scores.softmax(-1).view(1, N_V, N_Q // N_V, -1)
    return (weights @ v).view(1, N_Q, 1, D)


def rate(what: int, rounds: int, data: torch.Tensor) -> float:
    """What the machine does per second; see the op."""
    begin = time.perf_counter()
    work = torch.ops.diffqkv.probe(data, what, rounds)
    return work / (time.perf_counter() - begin)


def arithmetic_limit(dtype: torch.dtype) -> float:
    """FLOP/s."""
    nothing = torch.empty(0)
    dot = rate(1, 2_000_000, nothing) if dtype == torch.bfloat16 else 0
    return dot or rate(0, 2_000_000, nothing)


def prefill(tokens: int, dtype: torch.dtype, seconds: float) -> dict:
    q = torch.randn(1, N_Q, tokens, D).to(dtype)
    k, v = torch.randn(1, N_K, tokens, D).to(dtype), torch.randn(1, N_V, tokens, D).to(dtype)
    k_twin = torch.randn(1, N_V, tokens, D).to(dtype)
    limits: list[float] = []
    want = reference.attention(q.double(), k.double(), v.double(), causal=True)
    error = (diffqkv.flash_attention(q, k, v, causal=True).double() - want).abs().max().item()
    times = interleaved(
        {
            "ours": lambda _: diffqkv.flash_attention(q, k, v, causal=True),
            "sdpa_repeated": lambda _: sdpa(q, k.repeat_interleave(N_V // N_K, 1), v, True),
            "sdpa_gqa16": lambda _: sdpa(q, k_twin, v, True),
            "limit": lambda _: limits.append(arithmetic_limit(dtype)),
        },
        seconds,
    )
    flops = 2 * N_Q * (2 * D) * tokens * (tokens + 1) / 2
    return line("prefill", tokens, dtype, error, times, flops, "FLOP/s", median(limits))


def decode(tokens: int, dtype: torch.dtype, seconds: float) -> dict:
    q = torch.randn(1, N_Q, 1, D).to(dtype)
    token_bytes = (N_K + N_V) * D * dtype.itemsize
    copies = max(1, POOL_BYTES // (tokens * token_bytes))
    lengths = torch.tensor([tokens], dtype=torch.int32)
    ours, peers, twins = [], [], []
    for _ in range(copies):
        k, v = torch.randn(1, N_K, tokens, D).to(dtype), torch.randn(1, N_V, tokens, D).to(dtype)
        cache = diffqkv.Cache([(N_K, D, N_V, D)], max_length=tokens, batch_size=1, dtype=dtype, device="cpu")
        layer = cache.layers[0]
        layer.append(k, v)
        ours.append(layer)
        peers.append((k, v))
    for _ in range(max(1, POOL_BYTES // (tokens * 2 * N_V * D * dtype.itemsize))):
        twins.append(tuple(torch.randn(1, N_V, tokens, D).to(dtype) for _ in range(2)))

    def run_ours(n):
        layer = ours[n % copies]
        return diffqkv.decode_attention(q, layer.k_cache, layer.v_cache, lengths, k_layout=layer.k_layout)

    def run_repeated(n):
        k, v = peers[n % copies]
        return sdpa(q, k.repeat_interleave(N_V // N_K, 1), v, False)

    def run_twin(n):
        return sdpa(q, *twins[n % len(twins)], False)

    def run_matmul(n):
        return grouped_matmul(q, *peers[n % copies])

    window, limits = tokens * token_bytes, []
    memory = torch.zeros(POOL_BYTES // window, window, dtype=torch.uint8)

    def read(n):
        limits.append(rate(2, 1, memory[n % len(memory)]))

    k, v = peers[0]
    want = reference.attention(q.double(), k.double(), v.double())
    error = (run_ours(0).double() - want).abs().max().item()
    contenders = {"ours": run_ours, "sdpa_repeated": run_repeated, "sdpa_gqa16": run_twin, "matmul": run_matmul}
    times = interleaved(contenders | {"limit": read}, seconds)
    return line("decode", tokens, dtype, error, times, tokens * token_bytes, "B/s", median(limits))


def line(case, tokens, dtype, error, times, work, unit, limit) -> dict:
    """work: FLOPs or bytes of a call; limit: the machine's rate in the same unit per second."""
    correct = error <= TOLERANCE[dtype]
    ours = times["ours"].median
    del times["limit"]
    return {
        "case": case,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "max_error": error,
        "correct": correct,
        "ms": {name: time.median * 1e3 for name, time in times.items()},
        "spread_ms": {name: time.spread * 1e3 for name, time in times.items()},
        "rate": f"{work / ours / 1e9:.{0 if unit == 'FLOP/s' else 1}f} G{unit}",
        "limit": f"{limit / 1e9:.{0 if unit == 'FLOP/s' else 1}f} G{unit}",
        "of_limit": work / ours / limit,
        "over_ours": {name: time.median / ours for name, time in times.items() if name != "ours"} if correct else None,
    }


def machine() -> dict:
    cpuinfo = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpuinfo['model name']} (family {cpuinfo['cpu family']})",
        "cpu_isa": diffqkv.config()["cpu_isa"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffqkv": diffqkv.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
    }


def markdown(facts: dict, lines: list[dict]) -> str:
    def ratio(x, name):
        if name not in x["ms"]:
            return ""
        return f"{x['over_ours'][name]:.2f}" if x["correct"] else "wrong result"

    rows = [
        f"{facts['date']}, {facts['cpu']}, {facts['threads']} threads, kernels {facts['cpu_isa']}, torch "
        f"{facts['torch']}, commit {facts['commit']}. Heads {N_Q}/{N_K}/{N_V}, d = {D}, batch 1; median ± half the "
        "interquartile range. Peers: how many times as long they take.",
        "",
        "| case | tokens | dtype | ours, ms | rate, of limit | SDPA, K repeated | SDPA, GQA-16 | matmul |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        ratios = " | ".join(ratio(x, name) for name in ("sdpa_repeated", "sdpa_gqa16", "matmul"))
        rows.append(
            f"| {x['case']} | {x['tokens']} | {x['dtype']} | {x['ms']['ours']:.3f} ± {x['spread_ms']['ours']:.3f} | "
            f"{x['rate']}, {x['of_limit']:.0%} of {x['limit']} | {ratios} |"
        )
    return "\n".join(rows) + "\n"


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="per line")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--decode", type=int, nargs="*", default=[2048, 8192, 32768])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = machine()
    lines = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for case, sizes in ((prefill, args.prefill), (decode, args.decode)):
                for tokens in sizes:
                    lines.append(case(tokens, dtype, args.seconds))
                    print(markdown(facts, lines[-1:]).splitlines()[-1], flush=True)
    print("\n" + markdown(facts, lines))
    if args.json:
        write(args.json, json.dumps({"machine": facts, "lines": lines}, indent=1) + "\n")
    if args.markdown:
        write(args.markdown, markdown(facts, lines))
    return 0 if all(x["correct"] for x in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
