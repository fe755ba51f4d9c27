"""A training run: what is ready before its first step, and its results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft_training.config import Optimizer
from weft_training.data import Row
from weft_training.trained import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run before its first step: the base with an untrained adapter, and the rows."""

    model: TrainedModel
    rows: Sequence[Row]
    evaluation: Sequence[Row]
    max_length: int  # tokens per row
    run: str  # digest of all that decides the result


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Results of a run. losses: one per step, before that step's update. seconds: of the loop, without loading.

    evaluations: evaluation losses by step, means over batches.
    best_step: the step whose adapter is kept; 0 if nothing was evaluated, which keeps the last one.
    optimizer: the one that ran.
    """

    output: Path
    losses: tuple[float, ...]
    seconds: float
    num_parameters: int
    evaluations: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    optimizer: Optimizer = Optimizer.ADAMW

    @property
    def summary(self) -> str:
        """Size, losses and time in one line."""
        evaluated = ""
        if self.evaluations:
            evaluated = f", evaluation loss {self.evaluations[self.best_step]:.3f} at step {self.best_step}"
        return (
            f"{self.num_parameters:,} parameters, loss {self.losses[0]:.3f} to {self.losses[-1]:.3f} in "
            f"{len(self.losses)} steps{evaluated}, {self.seconds:.1f} s"
        )
