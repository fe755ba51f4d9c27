"""Progress bars of adapters that train together, a line for each."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weft_training.progress import Step


class ProgressBars(Progress):
    """Steps of every run: `with ProgressBars(console, titles) as bars: train_many(configs, progress=bars)`."""

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bars = [self.add_task(title, total=None, loss="–") for title in titles]

    def __call__(self, place: int, step: Step) -> None:
        self.update(self._bars[place], completed=step.number, total=step.num_steps, loss=f"{step.loss:.4f}")
