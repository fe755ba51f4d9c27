"""Training one adapter: `train(TrainConfig(…))` gives a PEFT directory.

transformers.Trainer runs the loop; the mathematics is `weft.methods`, as in serving. The same config, examples, thread
count and library versions give the same adapter on a CPU, bit for bit.
"""

import functools
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from weft.config import ModelConfig
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft_training import adapter as adapters
from weft_training import base as bases
from weft_training import data
from weft_training.adapter import MethodConfig
from weft_training.data import Example, Row
from weft_training.progress import Report, Step

_OUR_FILES = frozenset({directory.CONFIG_FILE, directory.WEIGHTS_FILE})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run.

    adapter: the method's config; its type says which method.
    data: a JSON Lines file; not needed where the examples are given to `train`.
    output: the PEFT directory to make; with `overwrite` it may be there already.
    num_steps: optimizer steps; the examples are shuffled anew each time they are used up.
    batch_size: examples of one step.
    learning_rate: its peak, after `num_warmup_steps` of linear growth; a cosine then takes it to zero.
    """

    model: ModelConfig
    adapter: MethodConfig
    output: Path
    data: Path | None = None
    num_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-4
    num_warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_norm_max: float = 1.0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for knob in ("num_steps", "batch_size"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1, given {getattr(self, knob)}")
        for knob in ("learning_rate", "gradient_norm_max"):
            if not getattr(self, knob) > 0:
                raise ValueError(f"{knob} must be above 0, given {getattr(self, knob)}")
        if not 0 <= self.num_warmup_steps <= self.num_steps:
            raise ValueError(f"num_warmup_steps must be 0 to {self.num_steps}, given {self.num_warmup_steps}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, given {self.weight_decay}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of it. losses: one per step, before that step's update. seconds: of the loop, without loading."""

    output: Path
    losses: tuple[float, ...]
    seconds: float
    num_parameters: int


def train(
    config: TrainConfig, *, examples: Sequence[Example] | None = None, progress: Report | None = None
) -> TrainResult:
    """Train an adapter and write it to `config.output`; `progress` is told of every step.

    Raises ValueError (InvalidData for a line of the data), OSError, or InvalidAdapter where a server would refuse the
    result. All of these come before the first step, except for numbers that training itself drives out of bounds.
    """
    _require_free(config.output, overwrite=config.overwrite)
    if (examples is None) == (config.data is None):
        raise ValueError("data: give either a file or the examples")
    if examples is None:
        assert config.data is not None
        examples = data.read_jsonl(config.data)
    if config.model.num_threads:
        torch.set_num_threads(config.model.num_threads)
    base = bases.load(config.model)
    generator = torch.Generator().manual_seed(config.seed)
    model = adapters.begin(config.adapter, base, generator)
    rows = data.encode(examples, base.tokenizer, max_length=base.max_model_len - model.num_virtual_tokens)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.output.name}.", dir=config.output.parent) as scratch:
        # A rehearsal: hours of training must not end in a directory that cannot be written, or that no server takes.
        _write(adapters.map_tensors(model.adapter, lambda t: torch.full_like(t, 0.5)), Path(scratch, "try"), base.shape)
        pad_token_id = base.tokenizer.pad_token_id
        recorder = _Recorder(progress)
        trainer = Trainer(
            model=model,
            args=_arguments(config, Path(scratch, "trainer"), use_cpu=base.device.type == "cpu"),
            train_dataset=_Rows(rows),
            data_collator=functools.partial(
                data.collate, pad_token_id=pad_token_id if isinstance(pad_token_id, int) else 0
            ),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        result = Path(scratch, "result")
        _write(model.adapter, result, base.shape)
        _replace(config.output, result)
    return TrainResult(
        output=config.output,
        losses=tuple(recorder.losses),
        seconds=seconds,
        num_parameters=model.adapter.num_parameters,
    )


def _arguments(config: TrainConfig, directory: Path, *, use_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.num_warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.gradient_norm_max,
        seed=config.seed,
        use_cpu=use_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number is to be seen
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not use_cpu,
    )


class _Rows(Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class _Recorder(TrainerCallback):
    """Keeps the losses and passes them on."""

    def __init__(self, report: Report | None) -> None:
        self.losses: list[float] = []
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        self.losses.append(logs["loss"])
        if self._report is not None:
            self._report(Step(state.global_step, state.max_steps, logs["loss"]))


def _require_free(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output: {output} exists; give another directory, or overwrite it")
    if not output.is_dir() or {file.name for file in output.iterdir()} - _OUR_FILES:
        raise FileExistsError(f"output: {output} holds other files than a PEFT adapter's and is not overwritten")


def _write(adapter: Adapter, path: Path, shape: BaseShape) -> None:
    """Write a PEFT directory, durably, and read it back as a server would."""
    directory.write(adapter, path, shape)
    adapters.read(path, shape)
    for file in path.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _replace(output: Path, result: Path) -> None:
    """Rename `result` to `output`. Readers find the old adapter, the new one, or for an instant none."""
    if output.exists():
        output.rename(result.with_name("replaced"))
    result.rename(output)
