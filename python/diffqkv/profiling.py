"""Where the time of a forward pass goes (Appendix F of the SIGMA paper).

The models mark ranges of their forward pass: `kv_cache`, `attention` and `augmented_q` within each `decoder_layer`.
`record` takes their times. In `torch.profiler` and its traces, and through `torch.autograd.profiler.emit_nvtx` in nsys,
they appear under these names, with or without it.

Ranges of a model that torch.compile made are not marked: compiled code has no such bounds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

if TYPE_CHECKING:
    import pandas

RANGES = ("kv_cache", "attention", "augmented_q")
LAYER = "decoder_layer"

_NOTHING = nullcontext()
_MOST_PENDING = 10_000  # events of a GPU whose times are not asked for yet

_recording: Recording | None = None
_of_thread = threading.local()  # its open step, and the names of the ranges that are open

# A moment on the clock, or on a GPU.
_Moment = int | torch.cuda.Event


@dataclass
class Step:
    """One forward pass of a model.

    Attributes:
        model: the name of its class.
        batch, tokens: the shape of its input, `[batch, tokens]`.
        seconds: from its call to its result: of the host on a CPU, between two events on a GPU.
        layers: by the index of the layer, the seconds of the ranges that were marked there, and of "rest", what is left
            of the layer, where the model marks its layers.
    """

    model: str
    batch: int
    tokens: int
    seconds: float
    layers: list[dict[str, float]]

    def total(self, name: str) -> float:
        """Seconds of a range in all layers; of "rest": all that lies outside of ranges."""
        if name == "rest":
            return self.seconds - sum(map(self.total, RANGES))
        return sum(layer.get(name, 0.0) for layer in self.layers)


class Recording:
    """The steps that `record` has seen."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._pending: list[_OpenStep] = []  # on a GPU
        self._lock = threading.Lock()  # models may run in several threads

    @property
    def steps(self) -> list[Step]:
        """The forward passes, in the order in which they ended. Waits for a GPU that is not done with them."""
        self._resolve()
        return self._steps

    def to_dict(self) -> dict[str, Any]:
        """`{"steps": [{model, batch, tokens, seconds, kv_cache, attention, augmented_q, rest, layers}]}`; seconds."""
        return {
            "steps": [
                {"model": step.model, "batch": step.batch, "tokens": step.tokens, "seconds": step.seconds}
                | {name: step.total(name) for name in (*RANGES, "rest")}
                | {"layers": [dict(layer) for layer in step.layers]}
                for step in self.steps
            ]
        }

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each step, layer and range: step, model, batch, tokens, layer, range, seconds.

        What a step spends outside of its layers has layer -1 and range "rest".

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("Recording.to_pandas needs pandas: pip install pandas") from error
        columns = ("step", "model", "batch", "tokens", "layer", "range", "seconds")
        rows = []
        for number, step in enumerate(self.steps):
            common = (number, step.model, step.batch, step.tokens)
            in_layers = [
                (*common, i, name, seconds) for i, layer in enumerate(step.layers) for name, seconds in layer.items()
            ]
            rows += [*in_layers, (*common, -1, "rest", step.seconds - sum(row[-1] for row in in_layers))]
        return DataFrame(rows, columns=columns)

    def table(self) -> str:
        """A line for each kind of step: how many there were, and the mean milliseconds of each range."""
        kinds: dict[tuple, list[Step]] = {}
        for step in self.steps:
            kinds.setdefault((step.model, step.batch, step.tokens), []).append(step)
        names = (*RANGES, "rest")
        lines = [("model", "batch", "tokens", "steps", *(f"{name}, ms" for name in (*names, "total")))]
        for kind, steps in kinds.items():
            means = [sum(step.total(name) for step in steps) / len(steps) for name in names]
            total = sum(step.seconds for step in steps) / len(steps)
            shown = [f"{1e3 * seconds:.3f}" for seconds in (*means, total)]
            lines.append((*map(str, kind), str(len(steps)), *shown))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)

    def _add(self, step: _OpenStep) -> None:
        with self._lock:
            self._pending.append(step)
        on_clock = isinstance(step.begin, int)
        if on_clock or sum(len(each.ranges) for each in self._pending) > _MOST_PENDING:
            self._resolve()

    def _resolve(self) -> None:
        with self._lock:
            self._steps += [step.resolved() for step in self._pending]
            self._pending.clear()


class _OpenStep:
    """A forward pass under way."""

    def __init__(self, recording: Recording, module: torch.nn.Module) -> None:
        self.recording, self.module = recording, module
        self.shape = (0, 0)
        self.ranges: list[tuple[str, int, _Moment, _Moment]] = []
        self.end: _Moment = 0
        device = module.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError("record: not built for steps that a CUDA graph captures")
        self.begin = _now(device)

    def resolved(self) -> Step:
        layers: list[dict[str, float]] = []
        whole: dict[int, float] = {}
        for name, index, begin, end in self.ranges:
            layers += [{} for _ in range(index + 1 - len(layers))]
            seconds = _seconds(begin, end)
            if name == LAYER:
                whole[index] = whole.get(index, 0.0) + seconds
            else:
                layers[index][name] = layers[index].get(name, 0.0) + seconds
        for index, seconds in whole.items():
            layers[index]["rest"] = seconds - sum(layers[index].values())
        return Step(type(self.module).__name__, *self.shape, _seconds(self.begin, self.end), layers)


def _now(device: torch.device) -> _Moment:
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, int):
        return (end - begin) / 1e9
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class _Range:
    """A range that a profiler or a recording sees. One within another of its name is a part of it."""

    __slots__ = ("begin", "device", "function", "is_outermost", "layer_idx", "name", "step")

    def __init__(self, name: str, layer_idx: int, device: torch.device) -> None:
        self.name, self.layer_idx, self.device = name, layer_idx, device

    def __enter__(self) -> None:
        names = _open_names()
        self.is_outermost = self.name not in names
        if not self.is_outermost:
            return
        names.add(self.name)
        self.function = None
        if torch.autograd.profiler._is_profiler_enabled:
            self.function = torch.profiler.record_function(self.name)
            self.function.__enter__()
        self.step = getattr(_of_thread, "step", None)
        if self.step is not None:
            self.begin = _now(self.device)

    def __exit__(self, *error: object) -> None:
        if not self.is_outermost:
            return
        if self.step is not None:
            self.step.ranges.append((self.name, self.layer_idx, self.begin, _now(self.device)))
        if self.function is not None:
            self.function.__exit__(*error)
        _open_names().discard(self.name)


def _open_names() -> set[str]:
    try:
        return _of_thread.names
    except AttributeError:
        _of_thread.names = set()
        return _of_thread.names


def span(name: str, layer_idx: int, x: Tensor) -> AbstractContextManager:
    """A range of a forward pass, on the device of x; nothing while no profiler and no recording looks on."""
    if torch.compiler.is_compiling() or (_recording is None and not torch.autograd.profiler._is_profiler_enabled):
        return _NOTHING
    return _Range(name, layer_idx, x.device)


@contextmanager
def record() -> Iterator[Recording]:
    """Takes the times of all forward passes of models of transformers while the context is open.

    The models here mark all ranges; others that run attention "diffqkv" have `attention` alone. A pass within another,
    as of the decoder within the model with its head, belongs to it. After `fuse_for_inference`, the first two products
    of augmented Q are a part of the product with K and V, and count as rest.

    On a CPU, and for what the host does, the clock is read; on a GPU events are recorded, and their times are asked for
    when `steps` is read. Within another recording, this one alone sees what happens.

    Raises:
        NotImplementedError: a compiled model, or a step that a CUDA graph captures, is run.
    """
    from torch._dynamo import OptimizedModule
    from transformers import PreTrainedModel

    global _recording
    outer, recording = _recording, Recording()

    def begin(module: torch.nn.Module, inputs: tuple) -> None:
        is_compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        if is_compiled or torch.compiler.is_compiling():
            raise NotImplementedError("record: compiled code has no ranges; record the model before torch.compile")
        if _recording is not recording or not isinstance(module, PreTrainedModel):
            return
        step = getattr(_of_thread, "step", None)
        # One of this module, or of an earlier recording, was interrupted: torch calls no hook then.
        if step is None or step.module is module or step.recording is not recording:
            _of_thread.step = _OpenStep(recording, module)

    def end(module: torch.nn.Module, inputs: tuple, *rest: Any) -> None:
        step = getattr(_of_thread, "step", None)
        if step is None or step.module is not module:
            return
        _of_thread.step = None
        if len(rest) == 1:  # it raised: there are no options then
            return
        options, _ = rest
        step.end = _now(module.device)
        given = [*inputs, options.get("input_ids"), options.get("inputs_embeds"), *options.values()]
        step.shape = next((tuple(x.shape[:2]) for x in given if isinstance(x, Tensor) and x.dim() >= 2), (0, 0))
        step.recording._add(step)

    hooks = [
        register_module_forward_pre_hook(begin),
        register_module_forward_hook(end, with_kwargs=True, always_call=True),
    ]
    _recording = recording
    try:
        yield recording
    finally:
        _recording = outer
        for hook in hooks:
            hook.remove()
            # Torch leaves this mark of a hook behind, and torch.compile then warns of it.
            _global_forward_hooks_with_kwargs.pop(hook.id, None)
