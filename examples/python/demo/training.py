"""A training loop that can be interrupted at any step and resumed with the same result."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.data import default_collate

from diffqkv.data import PackedDataset


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one sentence for the user."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Lengths in tokens, which are bytes and ends of text."""

    steps: int
    batch_size: int = 8
    context: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    final_learning_rate: float = 5e-5
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    evaluate_every: int = 100
    save_every: int = 100

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


@dataclass
class History:
    """Bits per token of every training step, and (step, bits per byte) on held-out text."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """One finished step. `held_out`: bits per byte if they were measured after it."""

    step: int
    loss: float
    held_out: float | None


class Trainer:
    """Trains `model` on `windows`; `run()` yields a Progress per step.

    Args:
        windows: `recipe.batch_size` of them per step, in their order.
        evaluate: bits per byte of the model on held-out text.
        checkpoint: the file that is written every `recipe.save_every` steps, at an interruption and at the end, and
            read when it exists.
        identity: what must be equal for a checkpoint to be continued, besides the recipe: corpus and model.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        windows: PackedDataset,
        recipe: Recipe,
        *,
        evaluate: Callable[[], float],
        checkpoint: Path,
        identity: dict[str, object],
    ) -> None:
        self.model, self.windows, self.recipe = model, windows, recipe
        self.evaluate, self.checkpoint = evaluate, checkpoint
        self.identity = {**identity, **asdict(recipe)}
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step, self.history = 0, History()
        self.interrupted = False
        if checkpoint.exists():
            self._resume()

    def run(self) -> Iterator[Progress]:
        """Trains to the end, or to the first Ctrl-C, after which `interrupted` is true and the checkpoint current."""
        if not self.history.held_out:
            self._measure()
        with _held_back_signals() as signals:
            while self.step < self.recipe.steps and not self.interrupted:
                loss = self._train_step()
                measured = self.step % self.recipe.evaluate_every == 0 or self.step == self.recipe.steps
                held_out = self._measure() if measured else None
                self.interrupted = bool(signals)
                if self.interrupted or self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                    self._save()
                yield Progress(self.step, loss, held_out)

    def _train_step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        self.model.train()
        first = self.step * self.recipe.batch_size
        batch = default_collate([self.windows[i] for i in range(first, first + self.recipe.batch_size)])
        with autocast(self.recipe.dtype):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.train.append(loss.item() / math.log(2))
        return self.history.train[-1]

    def _measure(self) -> float:
        bits = self.evaluate()
        self.history.held_out.append((self.step, bits))
        return bits

    def _save(self) -> None:
        """Writes beside the checkpoint and renames, so that a crash leaves the old file or the new one, whole."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "history": asdict(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        part = self.checkpoint.with_name(self.checkpoint.name + ".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.checkpoint)

    def _resume(self) -> None:
        advice = "start anew with --restart (make demo DEMO_ARGS=--restart) or use another --out"
        try:
            state = torch.load(self.checkpoint, weights_only=True)
            identity, step, history = state["identity"], state["step"], History(**state["history"])
            model, optimizer, random = state["model"], state["optimizer"], state["random"]
        except Exception as error:  # damaged bytes can make the reader raise anything
            raise CheckpointError(f"{self.checkpoint} cannot be read ({type(error).__name__}); {advice}") from error
        for key, want in self.identity.items():
            if identity.get(key) != want:
                raise CheckpointError(
                    f"{self.checkpoint} is of another run: {key} is {identity.get(key)}, not {want}; {advice}"
                )
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random)
        self.step, self.history = step, history


def bits_per_byte(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    dtype: str = "float32",
    first_special: int = 256,
) -> float:
    """Bits that the model needs for the text of the batches, per byte of it.

    Ends of text cost bits and are no bytes.
    """
    model.eval()
    nats, count = 0.0, 0
    with torch.no_grad(), autocast(dtype):
        for batch in batches:
            targets = _targets(batch)
            nats += model(**batch, use_cache=False).loss.item() * len(targets)
            count += (targets < first_special).sum().item()
    return nats / math.log(2) / count


def unigram_entropy(batches: Iterable[dict[str, torch.Tensor]], first_special: int = 256) -> float:
    """Entropy in bits per byte of the same text by the frequencies of its bytes alone."""
    targets = torch.cat([_targets(batch) for batch in batches])
    counts = torch.bincount(targets[targets < first_special]).double()
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item()


def _targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that a batch asks for, int64 `[targets]`."""
    labels = batch["labels"][:, 1:]
    return labels[labels >= 0]


def fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it in hardware, which is about twice as fast as float32."""
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def _held_back_signals() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is listed, to be acted upon between two steps; the second acts at once."""
    caught: list[int] = []
    previous: dict[int, object] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def hold_back(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, hold_back)
    try:
        yield caught
    finally:
        restore()
