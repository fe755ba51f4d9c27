"""Reports of a training run, and the progress bar that shows them."""

import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Step(NamedTuple):
    """A finished optimizer step; `number` counts from 1. loss: mean over the step's learned tokens.

    num_tokens: input tokens so far, over all steps.
    """

    number: int
    num_steps: int
    loss: float
    num_tokens: int = 0


Report = Callable[[Step], None]


class ProgressBar(Progress):
    """Steps on a terminal: `with ProgressBar(console, title) as bar: train(config, progress=bar)`."""

    def __init__(self, console: Console, title: str = "training") -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            _StepsPerSecond(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar = self.add_task(title, total=None, loss="–", tokens="")
        self._since: tuple[float, int] | None = None  # time and tokens at the first step: start-up does not count

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        since, tokens = self._since = self._since or (now, step.num_tokens)
        rate = f"{(step.num_tokens - tokens) / (now - since):,.0f} tokens/s" if step.num_tokens > tokens else ""
        loss = f"{step.loss:.4f}"
        self.update(self._bar, completed=step.number, total=step.num_steps, loss=loss, tokens=rate)


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s", style="progress.data.speed")
