"""Taking samples: decode steps at a ladder of contexts, real generation, and time within ops."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import diffqkv

from .. import profiling
from ..benchmarks.common.inputs import dtype_name
from ..benchmarks.common.timing import Elsewhere
from ..benchmarks.cpu import limits, models
from ..models.sigma.generation_sigma import CACHE
from .systems import PLAIN, System

ROUNDS, LEAST_ROUNDS = 15, 5
KET_TOKENS, KET_ROUNDS = 10, 3
_LADDER_FROM = 256
_VOCABULARY = 256  # of a part of the layers, where the head is no part of what is asked
_PROBE_BYTES = 64 << 20
# Where the time of attention goes in a profile: the ops of this package, and the one of torch.
KET_OPS = (
    "diffqkv::decode_attention",
    "diffqkv::selective_v_attention",
    "aten::scaled_dot_product_attention",
)


class Size(NamedTuple):
    """What all systems are measured at."""

    dtype: torch.dtype
    batch: int

    @property
    def keys(self) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype), "batch": self.batch}

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}, batch {self.batch}"


def ladder(prefixes: Iterable[int], outputs: Iterable[int]) -> list[int]:
    """Contexts at which a step is measured: from 1 token by doubling to the longest of the grid, and the prefixes."""
    prefixes = list(prefixes)
    longest = max(prefixes) + max(outputs)
    doubled = [_LADDER_FROM << i for i in range(longest.bit_length()) if _LADDER_FROM << i < longest]
    return sorted({1, longest, *doubled, *(prefix for prefix in prefixes if prefix > 0)})


def needed_bytes(systems: Iterable[System], base: diffqkv.SigmaConfig, layers: int, size: Size, longest: int) -> int:
    """Memory for the weights and caches of all systems; a stock cache is copied at every step."""
    itemsize, total, largest_layer = size.dtype.itemsize, 0, 0
    configs = [(system, system.config(base, layers)) for system in systems]
    for system, config in configs:
        k, v = (n * d for n, d in _sides(config))
        layer = size.batch * longest * (k + v) * itemsize
        total += layers * layer
        largest_layer = max(largest_layer, 3 * layer if system.is_stock else 0)
    weights = max(_on_meta(config, layers, base).num_parameters() for _, config in configs)
    has_integers = any(system.weights in models.INTEGERS for system in systems)
    return total + largest_layer + weights * itemsize + (weights // 16 if has_integers else 0)


def _sides(config: diffqkv.SigmaConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and their dimension, of K and of V."""
    return (config.num_key_heads, config.k_head_dim), (config.num_value_heads, config.head_dim)


def _small_head(config: diffqkv.SigmaConfig, base: diffqkv.SigmaConfig) -> diffqkv.SigmaConfig:
    if config.num_hidden_layers < base.num_hidden_layers:
        config.vocab_size = min(_VOCABULARY, config.vocab_size)
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def _on_meta(config: diffqkv.SigmaConfig, layers: int, base: diffqkv.SigmaConfig) -> nn.Module:
    with torch.device("meta"):
        return diffqkv.SigmaForCausalLM(_small_head(config, base))


class Subject:
    """A system with random weights and a full cache, whose steps are timed behind any number of its tokens."""

    def __init__(self, system: System, model: nn.Module, size: Size, longest: int, headroom: int) -> None:
        self.system, self.model, self.size = system, model, size
        self.device = model.device
        model.set_attn_implementation("sdpa" if system.is_stock else "diffqkv")
        config = model.config
        if system.is_stock:
            self.cache = DynamicCache(config=config)
            return
        self.cache = diffqkv.Cache(config, max_length=longest + headroom)
        for i in range(config.num_hidden_layers):
            self.cache.append(*(self._random(n, longest, d) for n, d in _sides(config)), i)

    def _random(self, heads: int, tokens: int, dim: int) -> Tensor:
        return models.random_heads(self.size.batch, heads, tokens, dim, self.size.dtype).to(self.device)

    def stand_at(self, context: int) -> None:
        """Lets the cache hold `context` tokens."""
        if not self.system.is_stock:
            for layer in self.cache.layers:
                layer.length = context
            return
        # Contiguous, as its own steps leave them.
        config = self.model.config
        groups = config.num_key_value_heads
        self.cache = DynamicCache(config=config)
        for i in range(config.num_hidden_layers):
            rows = (self._random(n, context, d) for n, d in _sides(config))
            grouped = (x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3).contiguous() for x in rows)
            self.cache.update(*grouped, i)

    @torch.inference_mode()
    def step(self, context: int) -> dict[str, float]:
        """Seconds of the ranges of one step behind `context` tokens."""
        self.stand_at(context)
        token = torch.ones(self.size.batch, 1, dtype=torch.long, device=self.device)
        with profiling.record() as recording:
            self.model(token, **{CACHE: self.cache}, use_cache=True)
        return _seconds(recording.steps)

    @torch.inference_mode()
    def generate(self, prefix: int, output: int) -> dict[str, float]:
        """Seconds of the ranges of `output` steps of `generate` behind `prefix` tokens, of the steps alone."""
        self.stand_at(prefix)
        ids = torch.ones(self.size.batch, prefix + 1, dtype=torch.long, device=self.device)
        with profiling.record() as recording:
            self.model.generate(
                ids,
                **{CACHE: self.cache},
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )
        return _seconds(recording.steps)

    @torch.inference_mode()
    def op_seconds(self, prefix: int, tokens: int) -> dict[str, float]:
        """Seconds within the ops of attention, over `tokens` steps, by the names of the ops."""
        self.stand_at(prefix)
        token = torch.ones(self.size.batch, 1, dtype=torch.long, device=self.device)
        on_gpu = self.device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of each start and end
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(tokens):
                self.model(token, **{CACHE: self.cache}, use_cache=True)
        events = {event.key: event for event in profile.key_averages() if event.key in KET_OPS}
        return {
            name: (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6 for name, event in events.items()
        }


def _seconds(steps: list[profiling.Step]) -> dict[str, float]:
    """Of all steps together: each range, what is left of the layers, and all."""
    in_layers = sum(layer["rest"] for step in steps for layer in step.layers)
    ranges = {name: sum(step.total(name) for step in steps) for name in profiling.RANGES}
    return {**ranges, "layers_rest": in_layers, "step": sum(step.seconds for step in steps)}


def subjects(
    systems: Iterable[System], base: diffqkv.SigmaConfig, layers: int, size: Size, longest: int, headroom: int,
    device: torch.device,
) -> list[Subject]:  # fmt: skip
    """The systems with weights of one pool of random numbers, and caches of `longest` tokens, room for more behind."""
    systems = list(systems)
    configs = [_small_head(system.config(base, layers), base) for system in systems]
    most = max(_on_meta(config, layers, base).num_parameters() for config in configs)
    weights = models.Pool(size.dtype, most + 3 * 32 * base.hidden_size * layers)
    found = []
    for system, config in zip(systems, configs, strict=True):
        form = models.PLAIN if system.weights == PLAIN else system.weights
        found.append(Subject(system, weights.model(config, form).to(device), size, longest, headroom))
    return found


class Machine:
    """What a sample is told of the machine: how fast memory is read then, and how much of the CPUs went elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._read = limits.read(_PROBE_BYTES) if device.type == "cpu" else None
        self._elsewhere = Elsewhere()

    def facts(self) -> dict[str, Any]:
        """Since the last call. A GPU has neither."""
        elsewhere, self._elsewhere = self._elsewhere.share(), Elsewhere()
        facts: dict[str, Any] = {"time": round(time.time(), 3), "cpu_elsewhere": round(elsewhere, 3)}
        if self._read is not None:
            begin = time.perf_counter()
            self._read.run()
            facts["read_bytes_per_s"] = round(self._read.work / (time.perf_counter() - begin))
        return facts
