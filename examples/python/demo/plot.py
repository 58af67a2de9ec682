"""The loss curve as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .training import History  # noqa: E402


def plot_losses(history: History, entropy: float, path: Path) -> None:
    """Training and held-out bits per byte over the steps, and the byte-unigram entropy of the held-out text."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    steps = range(1, len(history.train) + 1)
    axes.plot(steps, history.train, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(steps, _smooth(history.train), color="tab:blue", label="training (moving average)")
    held_out_steps, held_out = zip(*history.held_out, strict=True)
    axes.plot(held_out_steps, held_out, color="tab:orange", marker="o", label="held out")
    axes.axhline(entropy, color="gray", linestyle="--", label=f"byte-unigram entropy, held out: {entropy:.2f}")
    end = (held_out_steps[-1], held_out[-1])
    axes.annotate(f"{end[1]:.2f}", end, xytext=(0, 8), textcoords="offset points", ha="center", color="tab:orange")
    axes.set_ylim(0, max(1.3 * entropy, held_out[-1] + 1))
    axes.set(xlabel="step", ylabel="bits per byte", title="A small Sigma (DiffQKV attention) learns to read bytes")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smooth, total = [], 0.0
    for step, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        smooth.append(total / (1 - weight**step))
    return smooth
