"""The device and its limits, as torch reaches them."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from diffqkv.ops import library

from .context import REPOSITORY, Context
from .problems import SUBJECTS

GIB = 1 << 30


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment(context: Context, commit: str | None) -> None:
    if not library.loaded:
        raise RuntimeError(library.reason)
    path = Path(library.path)
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library": str(path),
        "library_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "commit": commit or _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
    }
    context.result["environment"] = facts
    context.result["kernels"] = {op: library.has_kernel(op, context.device.type) for op in SUBJECTS}
    if not context.on_gpu:
        return
    if not torch.cuda.is_available():
        context.result |= {"status": "error", "reason": "no CUDA device", "no_device": True}
        return
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "compute_sanitizer": shutil.which("compute-sanitizer") or "not on PATH",
    }


def median_ms(work: Callable[[], object], repeats: int = 15, warm_up: int = 3) -> float:
    """Device time of work by events, median."""
    for _ in range(warm_up):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def copy_gb_s() -> float:
    """A large device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(GIB // 4, device="cuda")  # 1 GiB, many times the L2
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def read_gb_s() -> float:
    """Reading alone: the best of torch's reductions."""
    data = torch.randn(GIB, device="cuda")  # 4 GiB
    readers = (data.sum, data.amax, lambda: torch.linalg.vector_norm(data))
    return max(data.nbytes / median_ms(read) / 1e6 for read in readers)


def probes(context: Context) -> None:
    context.result["read_gb_s"] = read_gb_s()
    context.save()
    context.result["copy_gb_s"] = copy_gb_s()
    context.save()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    context.result["bf16_tflops"] = 2 * n**3 / median_ms(lambda: a @ b) / 1e9
    clocks = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader")
    context.result["clocks"] = _output(*clocks)  # just after the product
