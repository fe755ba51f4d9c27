"""Reports of a run's steps: losses, curves for TensorBoard, and an end if they diverge."""

import math
from pathlib import Path
from typing import Any

import weft.methods.bnb  # noqa: F401  first: what follows imports bitsandbytes where peft is installed

from transformers import TrainerCallback

from weft_training.progress import Report, Step


class Diverged(ValueError):
    """A loss or a gradient that is not finite; the run ended and nothing was written."""


def require_finite(step: int, name: str, value: float, learning_rate: float) -> None:
    """Raise Diverged unless a step's loss or gradient norm is finite."""
    if not math.isfinite(value):
        raise Diverged(
            f"step {step}: {name} must be finite, given {value}; a lower learning rate than {learning_rate} may help"
        )


class Recorder(TrainerCallback):
    """Reports every step, and ends the run at the first one that is not finite."""

    def __init__(self, report: Report | None) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        for name in ("loss", "grad_norm"):
            require_finite(state.global_step, name, logs.get(name, 0.0), args.learning_rate)
        if self._report is not None:
            self._report(Step(state.global_step, state.max_steps, logs["loss"], state.num_input_tokens_seen))


class Curves(TrainerCallback):
    """Event files for TensorBoard, in `directory`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and an option

        self._writer = SummaryWriter(str(directory))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            if logs is not None and name in logs:
                self._writer.add_scalar(name, logs[name], state.global_step)
        self._writer.flush()  # keeps the curve of a run that is killed

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._writer.close()
