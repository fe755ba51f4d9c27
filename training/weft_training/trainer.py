"""Trains one adapter: `train(TrainConfig(…))` writes a PEFT directory.

transformers.Trainer runs the loop; the mathematics is `weft.methods`, as in serving. The same config, examples, thread
count and library versions give the same adapter on a CPU, bit for bit, even through a kill and `resume`. Under
`accelerate launch` the processes share the examples of each step, and only the first one writes.
"""

import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import weft.methods.bnb  # noqa: F401  first: what follows imports bitsandbytes where peft is installed

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from weft.model.loader import Base
from weft_training import activation, card, checkpoint, data, packing, trained
from weft_training import base as bases
from weft_training.checkpoint import Best, CheckpointingTrainer
from weft_training.config import Optimizer, Schedule, TrainConfig, optimizer_on
from weft_training.data import Conversation, Example
from weft_training.distillation import DistilledModel, load_teacher
from weft_training.history import Curves, Recorder
from weft_training.mixture import MixtureModel
from weft_training.output import rehearse, replace_output, require_free, rounded, write
from weft_training.progress import Report
from weft_training.recompute import recomputing
from weft_training.run import Prepared, TrainResult
from weft_training.trained import TrainedModel

_log = logging.getLogger(__name__)

Examples = Sequence[Example | Conversation]

# transformers' names, if they differ from ours.
_NAMES = {Optimizer.ADAMW: "adamw_torch", Schedule.CONSTANT: "constant_with_warmup"}
_MIXTURE_LACKS = {
    "packing": "a mixture, whose router may read a row's prompt",
    "gradient_checkpointing": "a mixture, whose gates are not computed again",
}
_VIRTUAL_LACKS = {
    "packing": "would have to be in every packed example",
    "gradient_checkpointing": "come through the cache",
}


def prepare(config: TrainConfig, *, examples: Examples | None = None) -> Prepared:
    """Load the base and encode the data. Raises the errors of `train` that come before its rehearsal."""
    learned, kept = read_data(config, examples)
    if config.model.num_threads:
        torch.set_num_threads(config.model.num_threads)
    return fit(config, bases.load(config.model, max_model_len=config.max_model_len), learned, kept)


def read_data(config: TrainConfig, examples: Examples | None) -> tuple[Examples, Examples]:
    """Return the examples to learn, and those that are only evaluated."""
    if (examples is None) == (not config.data):
        raise ValueError("data: give either a file or the examples")
    if examples is None:
        examples = data.read_jsonl(*config.data)
    kept: Examples = data.read_jsonl(*config.evaluation_data)
    if config.evaluation_share:
        examples, kept = data.split(examples, config.evaluation_share, config.seed)
    return examples, kept


def fit(config: TrainConfig, base: Base, learned: Examples, kept: Examples) -> Prepared:
    """Return an untrained adapter on `base`, and the data as rows of its tokenizer."""
    generator = torch.Generator().manual_seed(config.seed)
    model = trained.begin(config.adapter, base, generator)
    limit = base.max_model_len - model.num_virtual_tokens
    if config.max_length is not None and config.max_length > limit:
        raise ValueError(f"max_length must be at most {limit}, the base's limit, given {config.max_length}")
    max_length = config.max_length or limit
    _require_fit(config, model)
    rows = data.encode(learned, base.tokenizer, max_length=max_length)
    evaluation = data.encode(kept, base.tokenizer, max_length=max_length) if kept else []
    if model.invocation_tokens:
        activation.require_invoked(model.invocation_tokens, [*rows, *evaluation])
    read = (base.shape.digest, data.digest(rows), data.digest(evaluation), *model.inputs)
    run = checkpoint.digest_of(config, model.method, *read)
    return Prepared(model=model, rows=rows, evaluation=evaluation, max_length=max_length, run=run)


def _require_fit(config: TrainConfig, model: TrainedModel) -> None:
    """Refuse settings that this method or this base does not support."""
    if config.batch_size % (config.accumulation_steps * _world_size()):
        raise ValueError(
            f"batch_size must be a multiple of accumulation_steps times processes "
            f"({config.accumulation_steps} × {_world_size()}), given {config.batch_size}"
        )
    lacks = _MIXTURE_LACKS if isinstance(model, MixtureModel) else {}
    if model.num_virtual_tokens:
        lacks = {knob: f"{model.method}, whose virtual positions {reason}" for knob, reason in _VIRTUAL_LACKS.items()}
    for knob, reason in lacks.items():
        if getattr(config, knob):
            raise ValueError(f"{knob} must be false for {reason}")
    if config.packing and model.invocation_tokens:
        raise ValueError("packing must be false for an adapter with invocation_tokens, one to a row, given true")
    if config.packing:
        packing.require_apart(model.base.model)


def train(config: TrainConfig, *, examples: Examples | None = None, progress: Report | None = None) -> TrainResult:
    """Train an adapter and write it to `config.output`; `progress` is called after every step.

    Raises ValueError (InvalidData for a line of the data), OSError, or InvalidAdapter if a server would refuse the
    result. All of these come before the first step, except for a full disk, and for numbers that training itself drives
    out of bounds: Diverged names the step. After any error, the output is as it was before.
    """
    require_free(config.output, overwrite=config.overwrite)
    prepared = prepare(config, examples=examples)
    model = prepared.model
    checkpoints = checkpoint.directory_of(config.output)
    last = _last_checkpoint(config, checkpoints, prepared.run)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.output.name}.", dir=config.output.parent) as scratch:
        rehearse(model.made, Path(scratch, "try"), model.base.shape)
        callbacks: list[TrainerCallback] = [Recorder(progress)]
        if config.tensorboard is not None and _is_first():
            callbacks.append(Curves(config.tensorboard))
        directory = checkpoints if config.checkpoint_every else Path(scratch, "trainer")
        loop = make_loop(config, prepared, directory, callbacks)
        started = time.perf_counter()
        with recomputing(model) if config.gradient_checkpointing else contextlib.nullcontext():
            loop.resume(last)
        result = result_of(config, model, loop.state.log_history, time.perf_counter() - started)
        assert loop.best is not None
        loop.best.apply()
        if _is_first():
            made = Path(scratch, "result")
            write(rounded(model.made, config.save_dtype), made, model.base.shape)
            card.write(config, prepared, result, made)
            replace_output(config.output, made)
            checkpoint.discard(checkpoints)
    return result


def result_of(
    config: TrainConfig, model: TrainedModel, history: Sequence[Mapping[str, float]], seconds: float
) -> TrainResult:
    """Return the results of a run, from the log history of transformers' loop."""
    evaluations = checkpoint.evaluation_losses(history)
    return TrainResult(
        output=config.output,
        losses=tuple(entry["loss"] for entry in history if "loss" in entry),
        seconds=seconds,
        num_parameters=model.num_trained,
        evaluations=evaluations,
        best_step=min(evaluations, key=lambda step: evaluations[step]) if evaluations else 0,
        optimizer=optimizer_on(model.device.type, config),
    )


def _last_checkpoint(config: TrainConfig, checkpoints: Path, run: str) -> Path | None:
    """Return the checkpoint to resume from. Raises FileExistsError for those that may be neither used nor dropped."""
    if not config.checkpoint_every or not checkpoints.exists():
        return None
    if config.resume:
        return checkpoint.newest(checkpoints, run)
    if not config.overwrite:
        raise FileExistsError(
            f"output: {checkpoints} holds a run that did not end; resume goes on with it, overwrite starts again"
        )
    if _is_first():
        checkpoint.discard(checkpoints)
    return None


def make_loop(
    config: TrainConfig, prepared: Prepared, directory: Path, callbacks: Sequence[TrainerCallback] = ()
) -> CheckpointingTrainer:
    """Make the loop of one run: its order of rows, optimizer, schedule and clipping; `directory` takes its files."""
    model = prepared.model
    base = model.base
    whole: nn.Module = model
    if config.distillation is not None:
        teacher = load_teacher(config.distillation.teacher, base, config.model)
        if config.packing and getattr(teacher, "num_virtual_tokens", 0):
            raise ValueError("packing must be false for a teacher with virtual positions, given true")
        whole = DistilledModel(model, teacher, config.distillation)
    groups: Any = functools.partial(packing.pack, max_length=prepared.max_length) if config.packing else tuple
    collate = packing.collate if config.packing else data.collate
    pad_token_id = base.tokenizer.pad_token_id
    best = Best(list(model.parameters()), patience=config.patience)
    trainer = CheckpointingTrainer(
        model=whole,
        args=arguments(config, directory, use_cpu=base.device.type == "cpu"),
        train_dataset=groups(prepared.rows),
        eval_dataset=groups(prepared.evaluation) if prepared.evaluation else None,
        data_collator=functools.partial(collate, pad_token_id=pad_token_id if isinstance(pad_token_id, int) else 0),
        callbacks=[*callbacks, best],
    )
    trainer.run, trainer.best = prepared.run, best
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(config: TrainConfig, directory: Path, *, use_cpu: bool) -> TrainingArguments:
    """Return the arguments of transformers' loop."""
    optimizer = optimizer_on("cpu" if use_cpu else "cuda", config)
    if optimizer != config.optimizer:
        _log.warning(
            "optimizer: %s pages a GPU's memory, and this run has none; %s runs, with the same 8-bit moments",
            config.optimizer,
            optimizer,
        )
    per_pass = config.batch_size // (config.accumulation_steps * _world_size())
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=config.num_steps,
        per_device_train_batch_size=per_pass,
        per_device_eval_batch_size=per_pass,
        gradient_accumulation_steps=config.accumulation_steps,
        optim=_NAMES.get(optimizer, optimizer.value),
        learning_rate=config.learning_rate,
        lr_scheduler_type=_NAMES.get(config.schedule, config.schedule.value),
        warmup_steps=config.num_warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.gradient_norm_max,
        bf16=config.autocast,
        seed=config.seed,
        use_cpu=use_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite must stay visible
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        eval_strategy="steps" if config.evaluates else "no",
        eval_steps=config.evaluate_every or config.num_steps,
        prediction_loss_only=True,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or config.num_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
    )


def _world_size() -> int:
    """Return the number of processes of this run, as torch's launchers set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
