"""A study from its recipe to its samples, within a time."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
import transformers

import diffqkv

from ..benchmarks.common.report import commit
from ..benchmarks.cpu.report import machine as machine_facts
from . import measure
from .costs import cumulative
from .measure import KET_ROUNDS, KET_TOKENS, LEAST_ROUNDS, ROUNDS, Machine, Size, Subject
from .samples import Samples
from .systems import System

# Shares of the time: the ladder of steps, generating for real, time within ops.
_STEPS_UNTIL, _GENERATES_UNTIL = 0.70, 0.85
_SHORT_OUTPUT = 64  # tokens generated where no point of the grid fits the time
_VALIDATED = 3  # points of the grid


class Recipe(NamedTuple):
    """What a study measures.

    Attributes:
        config: the shape that is studied.
        layers: how many of its layers the measured models have.
        prefixes, outputs: the grid of tokens that are cached, and that are generated behind them.
    """

    config: diffqkv.SigmaConfig
    layers: int
    systems: Sequence[System]
    sizes: Sequence[Size]
    prefixes: Sequence[int]
    outputs: Sequence[int]
    device: torch.device

    @property
    def longest(self) -> int:
        return max(self.prefixes) + max(self.outputs)

    def identity(self) -> dict[str, Any]:
        """What a folder of samples must agree on."""
        facts = machine_facts()
        config = {name: x for name, x in self.config.to_dict().items() if name != "transformers_version"}
        return {
            "config": config,
            "layers": self.layers,
            "systems": [system.name for system in self.systems],
            "dtypes": list(dict.fromkeys(size.keys["dtype"] for size in self.sizes)),
            "batches": list(dict.fromkeys(size.batch for size in self.sizes)),
            "prefixes": list(self.prefixes),
            "outputs": list(self.outputs),
            "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "machine": {name: facts[name] for name in ("cpu", "cpu_isa", "threads", "cores")},
            "versions": {
                "diffqkv": diffqkv.__version__,
                "commit": commit(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def check_memory(recipe: Recipe) -> None:
    """Raises MemoryError, naming what fits, if the weights and caches of some size do not."""
    if recipe.device.type == "cuda":
        available = torch.cuda.mem_get_info(recipe.device)[0]
    else:
        available = psutil.virtual_memory().available
    for size in recipe.sizes:
        longest = recipe.longest

        def needed(tokens: int, size: Size = size) -> int:
            return measure.needed_bytes(recipe.systems, recipe.config, recipe.layers, size, tokens)

        if needed(longest) <= available:
            continue
        fitting = longest
        while fitting >= 1024 and needed(fitting) > available:
            fitting //= 2
        fits = f"{fitting} tokens fit" if fitting >= 1024 else "not even 1024 tokens fit"
        raise MemoryError(
            f"--grid: got contexts up to {longest} tokens of {recipe.layers} layers with batch {size.batch} in "
            f"{size.keys['dtype']}, for which {len(recipe.systems)} systems need {needed(longest) / 2**30:.1f} GiB, "
            f"want at most the {available / 2**30:.1f} GiB that are free ({fits}; fewer --layers or --systems help)"
        )


def take_samples(
    recipe: Recipe, samples: Samples, seconds: float, show: Callable[[str, float], None] = lambda text, share: None
) -> list[str]:
    """Measures for about so many seconds; what the samples have already is not measured again.

    show: is told what is being measured, and which share of the time is over.

    Returns:
        What was left out, in sentences.
    """
    begin, left_out = time.monotonic(), []

    def tell(text: str) -> None:
        show(text, min(1.0, (time.monotonic() - begin) / seconds))

    for number, size in enumerate(recipe.sizes):
        left = begin + seconds - time.monotonic()
        missing = _of_size(recipe, size, samples, left / (len(recipe.sizes) - number), tell)
        left_out += [f"{size}: {sentence}" for sentence in missing]
        gc.collect()
    return left_out


def _of_size(
    recipe: Recipe, size: Size, samples: Samples, seconds: float, tell: Callable[[str], None]
) -> Iterator[str]:
    """Measures all systems at one size; yields what is left out."""
    begin = time.monotonic()
    tell(f"{size}: weights and caches")
    subjects = measure.subjects(
        recipe.systems, recipe.config, recipe.layers, size, recipe.longest, 1 + KET_TOKENS, recipe.device
    )
    ladder = measure.ladder(recipe.prefixes, recipe.outputs)
    with _without_collection():
        yield from _steps(subjects, ladder, samples, begin + _STEPS_UNTIL * seconds, tell)
        yield from _generation(subjects, recipe, samples, begin + _GENERATES_UNTIL * seconds, tell)
        yield from _ops(subjects, recipe, samples, begin + seconds, tell)


@contextmanager
def _without_collection():
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _steps(
    subjects: list[Subject], ladder: list[int], samples: Samples, until: float, tell: Callable[[str], None]
) -> Iterator[str]:
    """A step of each system at each context, in rounds: all systems meet each state of the machine alike."""
    size, machine = subjects[0].size, Machine(subjects[0].device)
    for subject in subjects:
        subject.step(ladder[0])
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() > until:
            yield f"{number} rounds of steps, not {ROUNDS}"
            return
        before = None
        for context in ladder:
            missing = [
                subject
                for subject in subjects
                if samples.count(kind="step", system=subject.system.name, context=context, **size.keys) <= number
            ]
            if not missing:
                continue
            # A step costs at most in proportion to the text.
            if number == 0 and before is not None and context > ladder[1]:
                expected = before[1] * context / before[0]
                if time.monotonic() + LEAST_ROUNDS * expected > until:
                    yield f"contexts {_all(c for c in ladder if c >= context)}, for lack of time"
                    ladder = [c for c in ladder if c < context]
                    break
            tell(f"{size}: round {number + 1}, steps behind {context:,} tokens")
            facts, began = machine.facts(), time.monotonic()
            turn = number % len(missing)  # none always follows the same one
            for subject in missing[turn:] + missing[:turn]:
                what = {"kind": "step", "system": subject.system.name, "context": context}
                samples.add(subject.step(context), facts, **what, **size.keys)
            before = context, time.monotonic() - began


def _all(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _generation(
    subjects: list[Subject], recipe: Recipe, samples: Samples, until: float, tell: Callable[[str], None]
) -> Iterator[str]:
    """Generates at the longest points of the grid that fit the time, to compare with the sum of the steps."""
    size = subjects[0].size
    pair = [subject for subject in subjects if subject.system.name in ("sigma", "std")] or subjects[:1]
    curves = [_curve(samples, subject) for subject in pair]
    points = [(prefix, output) for prefix in recipe.prefixes for output in recipe.outputs]
    points += [(max(p for p in recipe.prefixes if p <= 4096), _SHORT_OUTPUT)]
    longest = min(contexts[-1] for contexts, _ in curves)
    costs = {
        (prefix, output): sum(cumulative(*curve, prefix, output) for curve in curves)
        for prefix, output in points
        if prefix + output <= longest
    }
    done = {(s["prefix"], s["output"]) for s in samples if s["kind"] == "generate" and _is_of(s, size)}
    for prefix, output in sorted(costs, key=lambda point: -costs[point]):
        if len(done) >= _VALIDATED:
            break
        # Each point may take half of the time that is left, so that shorter ones find some.
        if (prefix, output) in done or time.monotonic() + 2 * costs[prefix, output] > until:
            continue
        done.add((prefix, output))
        for subject in pair:
            tell(f"{size}: generating {output:,} tokens behind {prefix:,}")
            what = {"kind": "generate", "system": subject.system.name, "prefix": prefix, "output": output}
            samples.add(subject.generate(prefix, output), _now(), **what, **size.keys)
    if not done:
        yield "no generation fits the time: nothing validates the sums"


def _ops(
    subjects: list[Subject], recipe: Recipe, samples: Samples, until: float, tell: Callable[[str], None]
) -> Iterator[str]:
    """Time within the ops of attention while 10 tokens are generated: Table 8."""
    size, skipped = subjects[0].size, []
    prefixes = sorted({p for p in (*recipe.prefixes, recipe.longest) if p > 0})
    for prefix in prefixes:
        for number in range(KET_ROUNDS):
            for subject in subjects:
                what = {"kind": "ops", "system": subject.system.name, "prefix": prefix, "output": KET_TOKENS}
                if samples.count(**what, **size.keys) > number:
                    continue
                if time.monotonic() > until and (number or prefix > prefixes[0]):
                    skipped.append(prefix)
                    break
                tell(f"{size}: time within ops behind {prefix:,} tokens")
                samples.add(subject.op_seconds(prefix, KET_TOKENS), _now(), **what, **size.keys)
    if skipped:
        yield f"time within ops behind {_all(sorted(set(skipped)))} tokens, in part"


def _now() -> dict[str, float]:
    return {"time": round(time.time(), 3)}


def _is_of(sample: dict[str, Any], size: Size) -> bool:
    return size.keys.items() <= sample.items()


def _curve(samples: Samples, subject: Subject) -> tuple[list[int], list[float]]:
    """Contexts, and the median seconds of a step behind them."""
    seconds: dict[int, list[float]] = {}
    for sample in samples:
        if sample["kind"] == "step" and sample["system"] == subject.system.name and _is_of(sample, subject.size):
            seconds.setdefault(sample["context"], []).append(sample["seconds"]["step"])
    contexts = sorted(seconds)
    return contexts, [median(seconds[context]) for context in contexts]
