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

from diffqkv.benchmarks.common import report
from diffqkv.benchmarks.common.timing import Events, interleaved
from diffqkv.ops import library

from .calls import TESTED_OPS
from .context import Context

GIB = 1 << 30
_ROUNDS, _CALLS = 15, 3  # calls that follow each other, so that the host's time does not count


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
        "commit": commit or report.commit() or "unknown",
    }
    context.result["environment"] = facts
    context.result["kernels"] = {op: library.has_kernel(op, context.device.type) for op in TESTED_OPS}
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


def _per_second(work: float, *ways: Callable[[], object]) -> float:
    """The rate of the fastest way to move so many bytes, or to compute so many FLOPs."""
    times, _ = interleaved(Events(graph=False), {str(i): [way] * _CALLS for i, way in enumerate(ways)}, 0, _ROUNDS)
    return work / min(time.median for time in times.values())


def probes(context: Context) -> None:
    """What torch reaches: reading by the best of its reductions, a large copy (bytes read plus written), a product."""
    data = torch.randn(GIB, device="cuda")  # 4 GiB, many times the L2
    readers = data.sum, data.amax, lambda: torch.linalg.vector_norm(data)
    context.result["read_gb_s"] = _per_second(data.nbytes, *readers) / 1e9
    context.save()
    source, target = data[: GIB // 4], data[GIB // 4 : GIB // 2]
    context.result["copy_gb_s"] = _per_second(2 * source.nbytes, lambda: target.copy_(source)) / 1e9
    context.save()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    context.result["bf16_tflops"] = _per_second(2 * n**3, lambda: a @ b) / 1e12
    clocks = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader")
    context.result["clocks"] = _output(*clocks)  # just after the product
