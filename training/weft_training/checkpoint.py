"""Checkpoints of a run that may be killed, and bit-exact resumption from the last complete one.

    <output>.checkpoints/checkpoint-<step>/     transformers' files: adapter, optimizer, schedule, random state, history
                           best.safetensors     the adapter with the lowest evaluation loss so far
                           run.json             the run it belongs to; written last, so it marks a complete one

They are deleted when the adapter is written. Until then the two newest are kept, so that a kill during a write leaves
the other one intact.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import weft.methods.bnb  # noqa: F401  first: what follows imports bitsandbytes where peft is installed

import torch
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from weft import durable

_WHOLE = "run.json"
_BEST = "best.safetensors"
_PREFIX = "checkpoint-"
_DECIDES_NOTHING = frozenset({"output", "overwrite", "resume", "tensorboard", "checkpoint_every", "data"})


def directory_of(output: Path) -> Path:
    """Return the directory for the checkpoints of the run that makes `output`."""
    return output.with_name(output.name + ".checkpoints")


def digest_of(config: Any, *inputs: str) -> str:
    """Return the digest of all that decides a run: its config without output paths, and the digests of its inputs."""
    decisive = {name: value for name, value in to_jsonable_python(config).items() if name not in _DECIDES_NOTHING}
    # Keep the keys in order: of two patterns the first decides.
    return hashlib.sha256(json.dumps([decisive, *inputs]).encode()).hexdigest()


def newest(directory: Path, run: str) -> Path | None:
    """Return the last complete checkpoint, or None. Raises ValueError if it belongs to another run than `run`."""
    whole = [path.parent for path in directory.glob(f"{_PREFIX}*/{_WHOLE}")]
    if not whole:
        return None
    last = max(whole, key=lambda path: int(path.name.removeprefix(_PREFIX)))
    if json.loads((last / _WHOLE).read_text())["run"] != run:
        raise ValueError(
            f"resume: {directory} is of a run with another recipe, data or base; "
            "give what it was started with, or overwrite to start again"
        )
    return last


def discard(directory: Path) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(directory, ignore_errors=True)


class Best(TrainerCallback):
    """Parameter values at the lowest evaluation loss, and early stopping.

    parameters: the tensors that the optimizer updates.
    patience: evaluations in a row without a new lowest loss after which training stops; 0 for never.
    """

    def __init__(self, parameters: Sequence[Tensor], *, patience: int) -> None:
        self._parameters = parameters
        self._patience = patience
        self.tensors: list[Tensor] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy != "no" and state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = evaluation_losses(state.log_history)
        lowest = min(losses, key=lambda step: losses[step])  # the first of several equal ones
        if lowest == state.global_step:
            self.tensors = [tensor.detach().cpu().clone() for tensor in self._parameters]
        if self._patience and sum(step > lowest for step in losses) >= self._patience:
            control.should_training_stop = True

    def save(self, directory: Path) -> None:
        if self.tensors is not None:
            save_file({str(index): tensor for index, tensor in enumerate(self.tensors)}, directory / _BEST)

    def load(self, directory: Path) -> None:
        if (directory / _BEST).exists():
            found = load_file(directory / _BEST)
            self.tensors = [found[str(index)] for index in range(len(found))]

    @torch.no_grad()
    def apply(self) -> None:
        """Write the best values into the parameters; if there was no evaluation, the last values stay."""
        for tensor, best in zip(self._parameters, self.tensors or [], strict=self.tensors is not None):
            tensor.copy_(best)


def evaluation_losses(history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Return evaluation losses by step, from transformers' log history."""
    return {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}


class CheckpointingTrainer(Trainer):
    """transformers' Trainer, with checkpoints that are known to be complete."""

    run = ""
    best: Best | None = None

    def resume(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` if there is one."""
        if checkpoint is not None and self.best is not None:
            self.best.load(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(str(self.args.output_dir), f"{_PREFIX}{self.state.global_step}")
        if self.args.should_save:
            discard(directory)  # a kill may have left an incomplete one
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(directory)
        except (RuntimeError, SafetensorError) as error:  # torch's and safetensors' errors for a full disk
            raise OSError(f"checkpoint: {directory} could not be written: {error}") from error

    def _complete(self, directory: Path) -> None:
        if self.best is not None:
            self.best.save(directory)
        for path in directory.iterdir():
            durable.sync_file(path)
        temporary = directory / f".{_WHOLE}"
        temporary.write_text(json.dumps({"run": self.run}))
        durable.sync_file(temporary)
        durable.publish(temporary, directory / _WHOLE)
