"""Reports of training runs, and the progress bars that show them."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
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


class _Bars(Progress):
    """Steps and losses on a terminal, a line for each run. more: columns after the loss."""

    def __init__(self, console: Console, *more: ProgressColumn) -> None:
        steps = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        loss, left = TextColumn("loss {task.fields[loss]}"), TextColumn("left")
        super().__init__(*steps, loss, *more, TimeElapsedColumn(), left, TimeRemainingColumn(), console=console)

    def show(self, bar: TaskID, step: Step, **fields: Any) -> None:
        self.update(bar, completed=step.number, total=step.num_steps, loss=f"{step.loss:.4f}", **fields)


class ProgressBar(_Bars):
    """Steps of one run: `with ProgressBar(console, title) as bar: train(config, progress=bar)`."""

    def __init__(self, console: Console, title: str = "training") -> None:
        super().__init__(console, _StepsPerSecond(), TextColumn("{task.fields[tokens]}"))
        self._bar = self.add_task(title, total=None, loss="–", tokens="")
        self._since: tuple[float, int] | None = None  # time and tokens at the first step: start-up does not count

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        since, tokens = self._since = self._since or (now, step.num_tokens)
        rate = f"{(step.num_tokens - tokens) / (now - since):,.0f} tokens/s" if step.num_tokens > tokens else ""
        self.show(self._bar, step, tokens=rate)


class ProgressBars(_Bars):
    """Steps of every run: `with ProgressBars(console, titles) as bars: train_many(configs, progress=bars)`."""

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        super().__init__(console)
        self._bars = [self.add_task(title, total=None, loss="–") for title in titles]

    def __call__(self, place: int, step: Step) -> None:
        self.show(self._bars[place], step)


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s", style="progress.data.speed")
