"""A study from its recipe to its samples, within a time."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Sequence
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
    for number, size in enumerate(recipe.sizes):
        now = time.monotonic()
        mine = (begin + seconds - now) / (len(recipe.sizes) - number)

        def until(share: float, now: float = now, mine: float = mine) -> float:
            return now + share * mine

        def tell(text: str, size: Size = size) -> None:
            show(f"{size.keys['dtype']}, batch {size.batch}: {text}", min(1.0, (time.monotonic() - begin) / seconds))

        tell("weights and caches")
        subjects = measure.subjects(
            recipe.systems, recipe.config, recipe.layers, size, recipe.longest, 1 + KET_TOKENS, recipe.device
        )
        ladder = measure.ladder(recipe.prefixes, recipe.outputs)
        with _without_collection():
            left_out += _steps(subjects, ladder, samples, until(_STEPS_UNTIL), tell)
            left_out += _generation(subjects, recipe, samples, until(_GENERATES_UNTIL), tell)
            left_out += _ops(subjects, recipe, samples, until(1.0), tell)
        del subjects
        gc.collect()
    return left_out


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
) -> list[str]:
    """A step of each system at each context, in rounds: all systems meet each state of the machine alike."""
    keys, machine, left_out = subjects[0].size.keys, Machine(subjects[0].device), []
    about = f"{keys['dtype']}, batch {keys['batch']}"
    for subject in subjects:
        subject.step(ladder[0])
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() > until:
            left_out.append(f"{about}: {number} rounds of steps, not {ROUNDS}")
            break
        before = None
        for context in list(ladder):
            missing = [
                subject
                for subject in subjects
                if samples.count(kind="step", system=subject.system.name, context=context, **keys) <= number
            ]
            if not missing:
                continue
            # A step costs at most in proportion to the text.
            if number == 0 and before is not None:
                expected = before[1] * context / before[0]
                if context > ladder[1] and time.monotonic() + LEAST_ROUNDS * expected > until:
                    skipped = [c for c in ladder if c >= context]
                    left_out.append(f"{about}: contexts {_all(skipped)}, for lack of time")
                    ladder = [c for c in ladder if c < context]
                    break
            tell(f"round {number + 1}, steps behind {context:,} tokens")
            facts, began = machine.facts(), time.monotonic()
            turn = number % len(missing)  # none always follows the same one
            for subject in missing[turn:] + missing[:turn]:
                seconds = subject.step(context)
                samples.add(seconds, facts, kind="step", system=subject.system.name, context=context, **keys)
            before = context, time.monotonic() - began
    return left_out


def _all(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _generation(
    subjects: list[Subject], recipe: Recipe, samples: Samples, until: float, tell: Callable[[str], None]
) -> list[str]:
    """Generates at the longest points of the grid that fit the time, to compare with the sum of the steps."""
    keys, left_out = subjects[0].size.keys, []
    pair = [subject for subject in subjects if subject.system.name in ("sigma", "std")] or subjects[:1]
    points = [(prefix, output) for prefix in recipe.prefixes for output in recipe.outputs]
    points += [(max(p for p in recipe.prefixes if p <= 4096), _SHORT_OUTPUT)]
    done = {(s["prefix"], s["output"]) for s in samples if s["kind"] == "generate" and _has(s, keys)}
    costs = {}
    for prefix, output in points:
        try:
            costs[prefix, output] = sum(
                cumulative(*curve(samples, subject.system.name, "step", keys), prefix, output) for subject in pair
            )
        except ValueError:
            continue  # longer than what was measured
    fitting = sorted(costs, key=lambda point: -costs[point])
    for prefix, output in fitting:
        if len(done) >= _VALIDATED:
            break
        # Each point may take half of the time that is left, so that shorter ones find some.
        if (prefix, output) in done or time.monotonic() + 2 * costs[prefix, output] > until:
            continue
        done.add((prefix, output))
        for subject in pair:
            tell(f"generating {output:,} tokens behind {prefix:,}")
            seconds = subject.generate(prefix, output)
            what = {"kind": "generate", "system": subject.system.name, "prefix": prefix, "output": output}
            samples.add(seconds, {"time": round(time.time(), 3)}, **what, **keys)
    if not done:
        left_out.append(
            f"{keys['dtype']}, batch {keys['batch']}: no generation fits the time: nothing validates the sums"
        )
    return left_out


def _ops(
    subjects: list[Subject], recipe: Recipe, samples: Samples, until: float, tell: Callable[[str], None]
) -> list[str]:
    """Time within the ops of attention while 10 tokens are generated: Table 8."""
    keys, skipped = subjects[0].size.keys, []
    prefixes = sorted({p for p in (*recipe.prefixes, recipe.longest) if p > 0}) or [recipe.longest]
    for prefix in prefixes:
        for number in range(KET_ROUNDS):
            for subject in subjects:
                name = subject.system.name
                if samples.count(kind="ops", system=name, prefix=prefix, output=KET_TOKENS, **keys) > number:
                    continue
                if time.monotonic() > until and (number or prefix > prefixes[0]):
                    skipped.append(prefix)
                    break
                tell(f"time within ops behind {prefix:,} tokens")
                seconds = subject.op_seconds(prefix, KET_TOKENS)
                what = {"kind": "ops", "system": name, "prefix": prefix, "output": KET_TOKENS}
                samples.add(seconds, {"time": round(time.time(), 3)}, **what, **keys)
    if not skipped:
        return []
    return [
        f"{keys['dtype']}, batch {keys['batch']}: time within ops behind {_all(sorted(set(skipped)))} tokens, in part"
    ]


def _has(sample: dict[str, Any], keys: dict[str, Any]) -> bool:
    return all(sample.get(name) == value for name, value in keys.items())


def curve(samples: Samples, system: str, name: str, keys: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Contexts, and the median seconds of a range of a step behind them."""
    seconds: dict[int, list[float]] = {}
    for sample in samples:
        if sample["kind"] == "step" and sample["system"] == system and _has(sample, keys):
            seconds.setdefault(sample["context"], []).append(sample["seconds"][name])
    contexts = sorted(seconds)
    return contexts, [median(seconds[context]) for context in contexts]
