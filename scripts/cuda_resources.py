#!/usr/bin/env python3
"""What each CUDA kernel takes of a multiprocessor, as the compiler reports it: registers, shared memory, spills.

    scripts/cuda_resources.py build/cmake --out benchmarks/results/cuda_resources

Compiles the CUDA sources of a configured build once more, by its compile_commands.json, and writes OUT.json and OUT.md;
the latter also with what the planners make of Sigma's calls, and how fast those can be at best.
Exit status: 0, or 1 if a kernel spills registers or keeps anything else in local memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_THREADS = re.compile(r"\.entry (\w+)\(.*?\)\s*\.maxntid (\d+)", re.DOTALL)


class Arch(NamedTuple):
    """Of a multiprocessor."""

    registers: int
    threads: int
    blocks: int
    shared: int  # bytes, 1 KiB of which each block costs beside its own


_ARCHS = {
    "sm_80": Arch(65536, 2048, 32, 164 << 10),
    "sm_86": Arch(65536, 1536, 16, 100 << 10),
    "sm_89": Arch(65536, 1536, 24, 100 << 10),
    "sm_90a": Arch(65536, 2048, 32, 228 << 10),
}


# (n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch) of what is planned.
_CALLS = (
    (32, 4, 16, 64, 64, 1, 4096, 1),
    (32, 4, 16, 64, 64, 1, 32768, 1),
    (32, 4, 16, 64, 64, 1, 8192, 64),
    (32, 4, 16, 64, 64, 8, 32768, 1),
    (32, 4, 16, 64, 128, 1, 32768, 1),
    (32, 4, 16, 128, 128, 1, 32768, 1),
    (32, 16, 16, 64, 64, 1, 32768, 1),
    (32, 4, 16, 64, 64, 4096, 4096, 1),
    (32, 4, 16, 64, 128, 4096, 4096, 1),
    (32, 4, 16, 128, 128, 4096, 4096, 1),
)
_TFLOPS = {"a100": 312, "h100": 989, "h200": 989}  # of bf16, by the data sheet
_LATENCY_US = 1.0  # of memory under load


class Kernel(NamedTuple):
    source: str
    name: str
    arch: str
    threads: int
    registers: int
    static_shared: int
    stack: int
    spills: int

    def blocks(self) -> int | None:
        """That a multiprocessor has registers and threads for."""
        arch = _ARCHS.get(self.arch)
        if arch is None:
            return None
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256  # as they are handed out
        return min(arch.registers // per_warp // warps, arch.threads // (32 * warps), arch.blocks)

    def shared_left(self) -> int | None:
        """Bytes of shared memory that each of so many blocks can have."""
        blocks = self.blocks()
        return _ARCHS[self.arch].shared // blocks - 1024 if blocks else None


def short(demangled: str) -> str:
    """The kernel's struct and its arguments, or its function."""
    name = demangled.removeprefix("void ")
    name = re.sub(r"\(anonymous namespace\)::|diffqkv::device::|diffqkv::", "", name)
    if name.startswith("run_kernel<"):
        depth = 0
        for i, c in enumerate(name):
            depth += {"<": 1, ">": -1}.get(c, 0)
            if c == ">" and depth == 0:
                return name[len("run_kernel<") : i].strip()
    return name.partition("(")[0]


def parse(source: str, report: str, ptx: list[str]) -> list[Kernel]:
    """report: what `ptxas -v` prints; ptx: the texts of all architectures, which know the threads of a block."""
    threads = {name: int(count) for text in ptx for name, count in _THREADS.findall(text)}
    kernels = []
    for entry in _ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                source=source,
                name=entry["name"],
                arch=entry["arch"],
                threads=threads[entry["name"]],
                registers=int(entry["registers"]),
                static_shared=int(shared[1]) if shared else 0,
                stack=int(entry["stack"]),
                spills=int(entry["stores"]) + int(entry["loads"]),
            )
        )
    return kernels


def compiled(command: dict) -> list[Kernel]:
    words = shlex.split(command["command"])
    words = words[next(i for i, word in enumerate(words) if Path(word).name.startswith("nvcc")) :]  # without a launcher
    source = Path(command["file"])
    with tempfile.TemporaryDirectory() as folder:
        words[words.index("-o") + 1] = f"{folder}/kernel.o"
        words += ["-Xptxas=-v", "--keep", "--keep-dir", folder]
        run = subprocess.run(words, cwd=command["directory"], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{source}: {run.stderr[-2000:]}")
        ptx = [path.read_text() for path in Path(folder).glob("*.ptx")]
    return parse(re.sub(r".*/cuda/", "", source.as_posix()), run.stdout + run.stderr, ptx)


def demangled(kernels: list[Kernel]) -> list[Kernel]:
    names = "\n".join(kernel.name for kernel in kernels)
    lines = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [kernel._replace(name=short(line)) for kernel, line in zip(kernels, lines, strict=True)]


def table(kernels: list[Kernel], facts: str) -> str:
    """A line for each kernel, with the architectures side by side."""
    archs = sorted({kernel.arch for kernel in kernels})
    columns = ["source", "kernel", "threads", "static shared, bytes"]
    columns += [f"{arch} {what}" for arch in archs for what in ("registers", "blocks", "shared each, KiB")]
    lines = [
        "# What the CUDA kernels take",
        "",
        f"{facts} Blocks: as many as a multiprocessor has registers and threads for; shared each: the dynamic shared "
        "memory that each of them can have. Stack frames and spills: none, or the build fails.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for source, name in dict.fromkeys((kernel.source, kernel.name) for kernel in kernels):
        by_arch = {kernel.arch: kernel for kernel in kernels if (kernel.source, kernel.name) == (source, name)}
        one = next(iter(by_arch.values()))
        cells: list[object] = [source, f"`{name}`", one.threads, one.static_shared]
        for arch in archs:
            kernel = by_arch.get(arch)
            left = kernel and kernel.shared_left()
            cells += [kernel.registers, kernel.blocks(), left and left >> 10] if kernel else [None] * 3
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def limits(plan: dict, gpu: str, multiprocessors: int, bandwidth: float, resident: int) -> dict[str, float]:
    """Least microseconds of a call, by the bytes of its tensors, by what its blocks keep under way, by arithmetic.

    resident: blocks of a multiprocessor. bandwidth: GB/s. Bytes under way come once in a memory latency (Little's law);
    blocks that do not fill their last wave leave tensor cores idle.
    """
    busy = min(plan["blocks"], multiprocessors * resident)
    waves = -(-plan["blocks"] // (multiprocessors * resident))
    return {
        "memory": plan["bytes"] / bandwidth / 1e3,
        "latency": plan["bytes"] / (busy * plan["bytes_under_way"]) * _LATENCY_US,
        "arithmetic": plan["flops"] / _TFLOPS[gpu] / 1e6 * waves * multiprocessors * resident / plan["blocks"],
    }


def plans(kernels: list[Kernel]) -> str:
    """What the planners make of calls in bf16: a line for each, and GPU."""
    from diffqkv import _core

    columns = ["GPU", "heads", "d_k, d_v", "s_q", "s_k", "batch", "kernel", "registers", "shared, KiB"]
    columns += ["blocks resident", "blocks", "KiB under way", "memory, µs", "latency, µs", "arithmetic, µs"]
    lines = [
        "",
        "## What the planners make of it",
        "",
        "bf16, causal. Resident: blocks of a multiprocessor, by registers, threads and shared memory. Under way: "
        f"copies of a block while it computes, which come once in {_LATENCY_US:g} µs. The largest of the last three "
        "is the limit that the plan leaves; memory and arithmetic by the data sheet.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for gpu, arch in (("h200", "sm_90a"), ("a100", "sm_80")):
        facts = _core.GPUS[gpu]
        for n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch in _CALLS:
            plan = _core.plan_cuda_attention(facts, n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch, "bfloat16")
            kernel = next(k for k in kernels if (k.name, k.arch) == (plan["instance"], arch))
            by_shared = facts.shared_per_multiprocessor // (plan["shared_bytes"] + 1024)
            resident = min(kernel.blocks(), by_shared)
            least = limits(plan, gpu, facts.multiprocessors, facts.bandwidth_gb_s, resident)
            cells = [gpu, f"{n_q}/{n_k}/{n_v}", f"{d_k}, {d_v}", s_q, s_k, batch, f"`{plan['instance']}`"]
            cells += [kernel.registers, f"{plan['shared_bytes'] / 1024:.0f}", resident, plan["blocks"]]
            cells += [f"{plan['bytes_under_way'] / 1024:.0f}", *(f"{us:.1f}" for us in least.values())]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="folder with compile_commands.json")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    args = parser.parse_args()
    commands = json.loads((args.build / "compile_commands.json").read_text())
    commands = [command for command in commands if command["file"].endswith(".cu")]
    if not commands:
        parser.error(f"build: got {args.build} without CUDA sources, want one with DIFFQKV_CUDA=ON")
    with ThreadPoolExecutor(args.jobs) as pool:
        kernels = demangled([kernel for found in pool.map(compiled, commands) for kernel in found])
    kernels.sort(key=lambda k: (k.source, k.name, k.arch))
    nvcc = next(word for word in shlex.split(commands[0]["command"]) if Path(word).name.startswith("nvcc"))
    release = re.search(r"release [\d.]+, V([\d.]+)", _output(nvcc, "--version"))
    commit = _output("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*").strip()
    facts = f"nvcc {release[1]}, commit {commit}."
    rows = [kernel._asdict() | {"blocks": kernel.blocks(), "shared_left": kernel.shared_left()} for kernel in kernels]
    args.out.with_suffix(".json").write_text(json.dumps({"compiler": facts, "kernels": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(kernels, facts) + plans(kernels))
    spilling = [f"{k.name} ({k.arch}): stack {k.stack}, spills {k.spills}" for k in kernels if k.stack or k.spills]
    print("\n".join(spilling) or f"{len(kernels)} kernels, none spills: {args.out.with_suffix('.md')}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
