"""Progress on a terminal as a bar, elsewhere as plain lines."""

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from .training import Progress

PLAIN_LINES = 20


class Pace:
    """Speed since the first step seen, which itself is not timed: it includes start-up."""

    def __init__(self, steps: int, tokens_per_step: int) -> None:
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.first_step, self.begin = None, 0.0

    def status(self, now: Progress) -> str:
        """Loss, tokens per second and time left, e.g. "2.31 bits per byte, 11,200 tokens/s, 2:40 left"."""
        loss = f"{now.loss:.2f} bits per byte"
        if self.first_step is None:
            self.first_step, self.begin = now.step, time.perf_counter()
            return loss
        seconds_per_step = (time.perf_counter() - self.begin) / (now.step - self.first_step)
        minutes, seconds = divmod(round(seconds_per_step * (self.steps - now.step)), 60)
        return f"{loss}, {self.tokens_per_step / seconds_per_step:,.0f} tokens/s, {minutes}:{seconds:02} left"


def report(progress: Iterable[Progress], first: int, steps: int, tokens_per_step: int, console: Console) -> None:
    """Shows loss, tokens per second and time left while `progress` runs from step `first` to `steps`."""
    show = _bar if console.is_terminal else _lines
    show(progress, first, steps, Pace(steps, tokens_per_step), console)


def _bar(progress: Iterable[Progress], first: int, steps: int, pace: Pace, console: Console) -> None:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, completed=first, status="")
        for now in progress:
            bar.update(task, completed=now.step, status=pace.status(now))
            if now.held_out is not None:
                console.print(_measured(now, steps))


def _lines(progress: Iterable[Progress], first: int, steps: int, pace: Pace, console: Console) -> None:
    every = max(1, steps // PLAIN_LINES)
    for now in progress:
        status = pace.status(now)
        if now.step % every == 0:
            console.print(f"step {now.step}/{steps}: {status}")
        if now.held_out is not None:
            console.print(_measured(now, steps))


def _measured(now: Progress, steps: int) -> str:
    return f"step {now.step}/{steps}: {now.held_out:.3f} bits per byte on held-out text"
