"""Progress bars of adapters that train together, a line for each."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weft_training.progress import Step


class ProgressBars:
    """Steps of every run: `with ProgressBars(console, titles) as bars: train_many(configs, progress=bars)`."""

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._bars = [self._progress.add_task(title, total=None, loss="–") for title in titles]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, place: int, step: Step) -> None:
        self._progress.update(self._bars[place], completed=step.number, total=step.num_steps, loss=f"{step.loss:.4f}")
