"""Checkpoints of a run that may be killed, and going on from the last whole one, bit for bit.

    <output>.checkpoints/checkpoint-<step>/     transformers' files: adapter, optimizer, schedule, random state, history
                           best.safetensors     the adapter with the lowest evaluation loss so far
                           run.json             which run it is of; written last, so what has it is whole

They go when the adapter is written. The two newest stay until then, so a kill while one is written leaves the other.
"""

import hashlib
import json
import os
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

_WHOLE = "run.json"
_BEST = "best.safetensors"
_PREFIX = "checkpoint-"
_DECIDES_NOTHING = frozenset({"output", "overwrite", "resume", "tensorboard", "checkpoint_every", "data"})


def directory_of(output: Path) -> Path:
    """Where the checkpoints of the run that makes `output` are."""
    return output.with_name(output.name + ".checkpoints")


def digest_of(config: Any, *inputs: str) -> str:
    """What decides a run's result: its config, but for where the result and its traces go, and the digests it reads."""
    told = {name: value for name, value in to_jsonable_python(config).items() if name not in _DECIDES_NOTHING}
    # Keys stay in their order: which of two patterns comes first decides.
    return hashlib.sha256(json.dumps([told, *inputs]).encode()).hexdigest()


def newest(directory: Path, run: str) -> Path | None:
    """The last whole checkpoint; None where there is none. ValueError if it is of another run than `run`."""
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
    """What was trained as it was at the lowest evaluation loss, and when to stop looking for a lower one.

    parameters: what the optimizer writes.
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
        lowest = min(losses, key=lambda step: losses[step])  # the first, where several are equal
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
        """Write the best values into the parameters; without an evaluation the last ones stay."""
        for tensor, best in zip(self._parameters, self.tensors or [], strict=self.tensors is not None):
            tensor.copy_(best)


def evaluation_losses(history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Evaluation losses by step, of transformers' log history."""
    return {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}


class CheckpointingTrainer(Trainer):
    """transformers' Trainer whose checkpoints are known to be whole."""

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
            discard(directory)  # a kill may have left half of it
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(directory)
        except (RuntimeError, SafetensorError) as error:  # as torch and safetensors tell a full disk
            raise OSError(f"checkpoint: {directory} could not be written: {error}") from error

    def _complete(self, directory: Path) -> None:
        if self.best is not None:
            self.best.save(directory)
        for path in directory.iterdir():
            sync(path)
        temporary = directory / f".{_WHOLE}"
        temporary.write_text(json.dumps({"run": self.run}))
        sync(temporary)
        temporary.rename(directory / _WHOLE)
        sync(directory)


def sync(path: Path) -> None:
    """Let a file or a directory be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
