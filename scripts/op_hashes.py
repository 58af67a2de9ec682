"""A line with a hash of all results for each op, dtype and variant, for changes that must not move a bit.

Every instruction set level of this CPU, then plain torch. `op_hashes.py > before`, the change, `op_hashes.py --compare
before`: exit status 1 if a line differs. Hashes hold on one kind of CPU and one release of torch.
"""

import argparse
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LEVELS = ("v2", "v3", "v4", "v4_bf16")
HEADS = {
    "sigma": (32, 4, 16, 64, 64),
    "half_k": (8, 8, 4, 32, 64),
    "mha": (4, 4, 4, 128, 128),
    "odd": (12, 6, 4, 24, 40),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, 3), "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "seed": 5, "offset": 7},
}


def run(level: str) -> subprocess.CompletedProcess:
    environment = {"DIFFQKV_DISABLE_LIBRARY": "1"} if level == "torch" else {"DIFFQKV_CPU_ISA": level}
    command = [sys.executable, __file__, "--level", level]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def lines(level: str) -> Iterator[str]:
    import torch

    import diffqkv

    torch.manual_seed(0)
    torch.set_num_threads(2)

    def line(op: str, variant: str, dtype: torch.dtype, *results: torch.Tensor | None) -> str:
        digest = hashlib.sha256()
        for x in results:
            if x is not None:
                digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return f"{level} {op} {variant} {str(dtype).removeprefix('torch.')} {digest.hexdigest()[:16]}"

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in (*floats, torch.float64):
        for heads, (n_q, n_k, n_v, d_k, d_v) in HEADS.items():

            def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(shape).to(dtype)

            s_q, s_k = 70, 100
            q, k, v = random(2, n_q, s_q, d_k), random(2, n_k, s_k, d_k), random(2, n_v, s_k, d_v)
            dout, sinks = random(2, n_q, s_q, d_v), random(n_q)
            for name, options in OPTIONS.items():
                x = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
                spans = {"kv_start": int32(0, 3), "kv_end": int32(100, 77)} if name == "window" else {}
                out, lse = diffqkv.flash_attention(*x[:3], sinks=x[3], return_lse=True, **options, **spans)
                gradients = torch.autograd.grad(out, x, dout)
                yield line("flash_attention", f"{heads}/{name}", dtype, out, lse, *gradients)
                x = [t.transpose(1, 2).flatten(0, 1).clone().requires_grad_() for t in (q, k, v)]
                lengths = int32(0, 30, 30, 2 * s_q), int32(0, 90, 95, 2 * s_k), 110, 105
                out, lse = diffqkv.flash_attention_varlen(*x, *lengths, return_lse=True, **options)
                gradients = torch.autograd.grad(out, x, dout.transpose(1, 2).flatten(0, 1))
                yield line("flash_attention_varlen", f"{heads}/{name}", dtype, out, lse, *gradients)
            if dtype not in floats:
                continue
            groups = math.gcd(n_k, n_v)
            slots, seqlens = 320, int32(300, 41)
            for layout in ("rows", "panels"):
                panel = (d_k // 2, 32, 2) if dtype == torch.bfloat16 else (d_k, 32)
                k_shape = (groups, slots, n_k // groups, d_k) if layout == "rows" else (n_k, slots // 32, *panel)
                k_cache = torch.zeros(2, *k_shape, dtype=dtype)
                v_cache = torch.zeros(2, groups, slots, n_v // groups, d_v, dtype=dtype)
                stats = torch.zeros(2, n_v, d_v + 1)
                angles = random(2, 310, d_k)
                positions = torch.arange(310).repeat(2, 1)
                new = random(2, n_k, 310, d_k), random(2, n_v, 310, d_v), positions
                rope = {"cos": angles, "sin": angles.flip(1).contiguous()}
                diffqkv.kv_cache_update(k_cache, v_cache, *new, v_stats=stats, k_layout=layout, **rope)
                yield line("kv_cache_update", f"{heads}/{layout}", dtype, k_cache, v_cache, stats)
                cache = k_cache, v_cache, seqlens
                for s_q in (1, 3, 20):
                    q = random(2, n_q, s_q, d_k)
                    for name in ("plain", "window"):
                        options = {} if name == "plain" else {"window": (50, 0), "softcap": 2.0, "sinks": sinks}
                        results = diffqkv.decode_attention(q, *cache, k_layout=layout, return_lse=True, **options)
                        yield line("decode_attention", f"{heads}/{layout}/{s_q}/{name}", dtype, *results)
                    for tail, error in (("drop", None), ("renorm", None), ("mean", None), ("drop", 0.05)):
                        out, all_stats = diffqkv.selective_v_attention(
                            q, *cache, 10, tail=tail, max_error=error, keep_first=2, keep_last=3, v_stats=stats,
                            k_layout=layout, return_stats=True,
                        )  # fmt: skip
                        variant = f"{heads}/{layout}/{s_q}/{tail}/{error}"
                        yield line("selective_v_attention", variant, dtype, out, *all_stats)
        if dtype in floats:
            gate, up = (torch.randn(777, 13).to(dtype).requires_grad_() for _ in range(2))
            out = diffqkv.swiglu(gate, up)
            gradients = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
            yield line("swiglu", "-", dtype, out, *gradients)
            n, k = 301, 512
            for form in ("own", "int8", "int4"):
                weight, scales = torch.randn(n, k).to(dtype), None
                if form != "own":
                    weight, scales = diffqkv.quantization.quantize(weight, int(form.removeprefix("int")))
                    scales = diffqkv.quantization.pack_groups(scales)
                pack = diffqkv.quantization.pack_int4 if form == "int4" else diffqkv.quantization.pack
                panels, bias = pack(weight), torch.randn(n).to(dtype)
                for rows in (1, 3, 20):
                    out = diffqkv.packed_linear(torch.randn(rows, k).to(dtype), panels, n, scales=scales, bias=bias)
                    yield line("packed_linear", f"{form}/{rows}", dtype, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier output of this script")
    parser.add_argument("--level", choices=(*LEVELS, "torch"), help="this one alone")
    arguments = parser.parse_args()
    if arguments.level:
        for each in lines(arguments.level):
            print(each)
        return 0
    found: list[str] = []
    for level in (*LEVELS, "torch"):
        result = run(level)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1]
            print(f"{level}: skipped: {reason}" if "on this CPU" in reason else result.stderr, file=sys.stderr)
            if "on this CPU" not in reason:
                return 1
        found += result.stdout.splitlines()
    if not arguments.compare:
        print(*found, sep="\n")
        return 0
    wanted = arguments.compare.read_text().splitlines()
    differing = sorted(set(found) ^ set(wanted))
    print(*differing, f"{len(found)} lines, {len(differing)} in one of the two only", sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
