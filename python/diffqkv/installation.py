"""What is installed, and which path each op takes."""

from __future__ import annotations

from typing import Any

import torch

from . import _transformers
from ._version import __version__
from .ops import dispatch, library
from .ops.checks import wrong
from .ops.dispatch import OPS

try:
    from . import _core
except ImportError as error:
    _core, _core_reason = None, f"diffqkv._core does not import: {error}"
else:
    _core_reason = None

_KERNEL, _COMPOSED = "compiled kernel", "plain torch"


def _cuda_path(op: str) -> str:
    runs, remark = dispatch.cuda_path(OPS[op])
    return (_KERNEL if runs else _COMPOSED) + (f" ({remark})" if remark else "")


def _cuda_archs() -> list[str] | None:
    if not any(library.has_kernel(op, "cuda") for op in OPS):
        return []
    return None if _core is None else _core.cuda_archs()


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def config() -> dict[str, Any]:
    """The configuration as a dict.

    Keys: `version`; `library`: path of the compiled library or None, with `reason`; `cpu_isa`: instruction set of the
    CPU kernels; `cuda_archs`: what the CUDA kernels were compiled for; `device`; `transformers`: the release that the
    models use or None, with `models_reason`; `ops`: for each op the path that it takes, by device type. `cpu_isa` is
    None without the library, and either is where `diffqkv._core`, which knows them, is missing.
    """
    return {
        "version": __version__,
        "library": library.path,
        "reason": library.reason,
        "cpu_isa": _core.cpu_isa() if library.loaded and _core is not None else None,
        "cuda_archs": _cuda_archs(),
        "device": _device(),
        "transformers": _transformers.release if _transformers.error is None else None,
        "models_reason": None if _transformers.error is None else _transformers.why_not(),
        "ops": {op: {"cpu": _KERNEL if library.loaded else _COMPOSED, "cuda": _cuda_path(op)} for op in OPS},
    }


def show_config() -> None:
    """Prints `config()`."""
    c = config()
    unknown = "no compiled library" if not library.loaded else _core_reason
    print(f"diffqkv {c['version']}, torch {torch.__version__}")
    print(f"  library     {c['library'] or 'none: ' + c['reason']}")
    print(f"  cpu_isa     {c['cpu_isa'] or unknown}")
    print(f"  cuda_archs  {unknown if c['cuda_archs'] is None else ', '.join(c['cuda_archs']) or 'none'}")
    print(f"  device      {c['device']}")
    models = f"none: {c['models_reason']}" if c["models_reason"] else f"transformers {c['transformers']}"
    print(f"  models      {models}")
    for op, paths in c["ops"].items():
        for device, path in paths.items():
            print(f"  {op if device == 'cpu' else '':<22} {device:<5} {path}")


def _gpu(device: str | torch.device) -> tuple[str, Any]:
    """Name and facts of a GPU: one that is here, or one of those that the planners know by name."""
    if str(device) in _core.GPUS:
        return str(device), _core.GPUS[str(device)]
    known = f"one of {', '.join(_core.GPUS)}"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise wrong("device", repr(device), f"'cpu', a CUDA device, or {known}") from None
    if device.type != "cuda":
        raise NotImplementedError(f"explain: device {device} has no kernels; its ops run in plain torch")
    if not torch.cuda.is_available():
        raise wrong("device", f"{device}, of which there is none here", known)
    properties = torch.cuda.get_device_properties(device)
    facts = _core.DeviceFacts()
    facts.multiprocessors = properties.multi_processor_count
    facts.capability = 10 * properties.major + properties.minor
    facts.shared_per_block = properties.shared_memory_per_block_optin
    facts.shared_per_multiprocessor = properties.shared_memory_per_multiprocessor
    facts.registers_per_multiprocessor = properties.regs_per_multiprocessor
    return properties.name, facts


def explain(
    n_q: int,
    n_k: int,
    n_v: int,
    d_k: int,
    d_v: int,
    s_q: int,
    s_k: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> str:
    """How `flash_attention` or `decode_attention` would run a shape: the plan that the op itself makes, as text.

    device: "cpu"; "cuda" for the GPU at hand; or a GPU by name, which need not be there: "h100", "h200", "a100",
    "rtx4090".

    Raises:
        ValueError: the head counts are no head map; there is no such GPU.
        NotImplementedError: the device has no attention kernel.
        RuntimeError: this installation has no `diffqkv._core`.
    """
    if _core is None:
        raise RuntimeError(f"explain needs the compiled planner: {_core_reason}")
    name = str(dtype).removeprefix("torch.")
    shape = (n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch, name)
    lines = {"shape": f"heads {n_q}/{n_k}/{n_v}, d_k {d_k}, d_v {d_v}, s_q {s_q}, s_k {s_k}, batch {batch}, {name}"}
    if str(device).partition(":")[0] == "cpu":
        plan = _core.plan_attention(*shape, torch.get_num_threads())
        lines |= {
            "kernel": f"{plan['kernel']} ({plan['isa']})",
            "tiles": f"{plan['block_q']} queries x {plan['block_k']} keys",
            "work": f"{plan['items']} items, split {plan['split']}, on {plan['threads']} threads",
            "bound by": plan["bound"],
        }
    else:
        gpu, facts = _gpu(device)
        plan = _core.plan_cuda_attention(facts, *shape)
        op = plan["kernel"].partition(",")[0]
        tiles = f"{plan['block_q']} query rows x {plan['block_k']} keys, {plan['stages']} stages"
        lines |= {
            "device": f"{gpu}, {facts.multiprocessors} multiprocessors, compute capability {facts.capability / 10:.1f}",
            "kernel": f"{plan['kernel']}: {_cuda_path(op)}",
            "tiles": f"{tiles}, {plan['shared_bytes']} bytes of shared memory",
            "work": f"{plan['blocks']} blocks of {plan['threads']} threads, {plan['splits']} splits of a sequence",
            "memory": f"{plan['workspace_bytes']} bytes of workspace, each K row read {plan['k_reads']} times",
        }
        if facts.bandwidth_gb_s:
            lines["floor"] = f"{plan['bytes'] / facts.bandwidth_gb_s / 1e3:.3g} µs at {facts.bandwidth_gb_s} GB/s"
    lines["FLOPs"] = f"{plan['flops']:.4g}"
    lines["bytes"] = f"{plan['bytes']:.4g} ({plan['flops'] / max(plan['bytes'], 1):.3g} FLOP/byte)"
    return "\n".join(f"{key:<10}{value}" for key, value in lines.items())
