"""Training of many adapters at once: `train_many([TrainConfig(…), …])` writes a PEFT directory for each.

    min over φ₁ … φ_N of Σ_k L_k(f(θ₀, φ_k)),   D_k, learning rate, batch size, steps, clipping and seed each k's own

The sum separates into N problems that share the frozen θ₀: an adapter's gradient, and so its whole run, is the same as
when it is trained alone, up to the rounding of a wider batch (tests/training/test_joint.py states by how much). The
runs share the base's forward and backward pass, whose cost for few rows is mostly fixed.

Each run has the row order, optimizer and schedule of the single trainer (`make_loop`). An adapter that has finished its
steps is written at once and leaves the batch.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import weft.methods.bnb  # noqa: F401  first: what follows imports bitsandbytes where peft is installed

import torch
from torch import Tensor
from transformers import Trainer

from weft.model.loader import Base
from weft_training import base as bases
from weft_training import card, joint_model, output, trainer
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.history import require_finite
from weft_training.joint_model import Share
from weft_training.mixture import MixtureTrainConfig
from weft_training.progress import Step
from weft_training.run import Prepared, TrainResult
from weft_training.trainer import Examples

ReportOf = Callable[[int, Step], None]

# Fixed cost of a forward and backward pass, in tokens: 26 ms against 0.07 ms per token (models/weft-demo in NF4 on two
# cores). A share that would be padded by more than that gets a pass of its own.
_PASS_TOKENS = 350

# Options that only a single run supports, each with the value that turns it off.
_ALONE: Mapping[str, Any] = {
    "accumulation_steps": 1,
    "autocast": False,
    "gradient_checkpointing": False,
    "evaluation_data": (),
    "evaluation_share": 0.0,
    "packing": False,
    "distillation": None,
    "checkpoint_every": 0,
    "tensorboard": None,
}


def train_many(
    configs: Sequence[TrainConfig],
    *,
    examples: Sequence[Examples] | None = None,
    progress: ReportOf | None = None,
    pass_tokens_max: int = 16_384,
) -> tuple[TrainResult, ...]:
    """Train one adapter for each config, all on one base; results in the order of `configs`.

    examples: those of each config, if none has `data`.
    progress: called for every step of every adapter, with the adapter's index in `configs`.
    pass_tokens_max: tokens, padding included, of one forward and backward pass, whose activations are in memory at
        once; a step with more takes several. The batch of one adapter is never split. `seconds` of a result is the time
        from the start until that adapter was finished.

    Raises what `trainer.train` raises, with a note that names the output of the config at fault, and ValueError if
    configs have different bases, the same output, or an option that only a single run supports. All of these come
    before the first step, except Diverged. If the run ends early, adapters that are already finished stay where they
    were written.
    """
    _check(configs, examples)
    model_config = configs[0].model
    given = [None] * len(configs) if examples is None else examples
    read: list[Examples] = []
    for config, own in zip(configs, given, strict=True):
        with _named(config):
            read.append(trainer.read_data(config, own)[0])
    if model_config.num_threads:
        torch.set_num_threads(model_config.num_threads)
    base = bases.load(model_config, max_model_len=configs[0].max_model_len)
    with ExitStack() as stack:
        runs = [_start(stack, base, place, *of) for place, of in enumerate(zip(configs, read, strict=True))]
        started = time.perf_counter()
        results: dict[int, TrainResult] = {}
        while running := [run for run in runs if run.place not in results]:
            for run, loss in zip(running, _step(base, running, pass_tokens_max), strict=True):
                run.losses.append(loss)
                with _named(run.config):
                    require_finite(len(run.losses), "loss", loss, run.config.learning_rate)
                if progress is not None:
                    progress(run.place, Step(len(run.losses), run.config.num_steps, loss))
                if len(run.losses) == run.config.num_steps:
                    results[run.place] = _finish(run, base, time.perf_counter() - started)
    return tuple(results[place] for place in range(len(configs)))


class _Run(NamedTuple):
    """An adapter in training. losses: of the steps made."""

    place: int
    config: TrainConfig
    prepared: Prepared
    batches: "Iterator[tuple[dict[str, Tensor], Any]]"
    loop: Any  # transformers' Trainer, whose optimizer and schedule are typed as optional
    scratch: Path
    losses: list[float]

    @property
    def model(self) -> AdaptedModel:
        """The base with this run's adapter; `_check` admits no other kind of run."""
        assert isinstance(self.prepared.model, AdaptedModel)
        return self.prepared.model


def _check(configs: Sequence[TrainConfig], examples: Sequence[Examples] | None) -> None:
    if not configs:
        raise ValueError("configs: there are none")
    if examples is not None and len(examples) != len(configs):
        raise ValueError(f"examples: must be one sequence for each of {len(configs)} configs, given {len(examples)}")
    outputs: set[Path] = set()
    for config in configs:
        with _named(config):
            if config.model != configs[0].model:
                raise ValueError(f"model: must be one for all adapters, {configs[0].model}, given {config.model}")
            if config.max_model_len != configs[0].max_model_len:
                one = configs[0].max_model_len
                raise ValueError(f"max_model_len must be one for all adapters, {one}, given {config.max_model_len}")
            if getattr(config.adapter, "invocation_tokens", ()):
                raise ValueError("invocation_tokens: an adapter that has some is trained alone")
            if getattr(config.adapter, "dropout", 0):
                raise ValueError("dropout: an adapter that has some is trained alone")
            if config.output.resolve() in outputs:
                raise ValueError(f"output: must be another for each adapter, given {config.output} twice")
            outputs.add(config.output.resolve())
            if isinstance(config.adapter, MixtureTrainConfig):
                raise ValueError("method must be an adapter's where adapters train together, given mixture")
            for knob, value in _ALONE.items():
                if getattr(config, knob) != value:
                    raise ValueError(
                        f"{knob} must be {value!r} where adapters train together, given {getattr(config, knob)!r}"
                    )
            output.require_free(config.output, overwrite=config.overwrite)


@contextmanager
def _named(config: TrainConfig) -> Iterator[None]:
    """Add a note to errors raised inside that names the adapter at fault."""
    try:
        yield
    except Exception as error:
        error.add_note(f"(the adapter {config.output})")
        raise


def _start(stack: ExitStack, base: Base, place: int, config: TrainConfig, examples: Examples) -> _Run:
    with _named(config):
        prepared = trainer.fit(config, base, examples, ())
        config.output.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{config.output.name}."
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=config.output.parent)))
        output.rehearse(prepared.model.made, scratch / "try", base.shape)
        loop = trainer.make_loop(config, prepared, scratch / "trainer")
        loader = loop.get_train_dataloader()  # first: it takes its seed from the one that the loop has just set
        loop.create_optimizer_and_scheduler(config.num_steps)
        return _Run(place, config, prepared, _batches(loop, loader), loop, scratch, [])


def _batches(loop: Trainer, loader: Any) -> "Iterator[tuple[dict[str, Tensor], Any]]":
    """Yield the batches that the loop would draw, without end, each with the divisor of its loss."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        iterator = iter(loader)
        while True:
            drawn, num_items = loop.get_batch_samples(iterator, 1, loop.args.device)
            if not drawn:
                break
            yield drawn[0], num_items


def _step(base: Base, runs: Sequence[_Run], pass_tokens_max: int) -> list[float]:
    """Run one optimizer step for every run. Returns the losses before it."""
    shares = [Share(run.model, *next(run.batches)) for run in runs]
    found: dict[int, float] = {}
    for members in buckets(shares, pass_tokens_max):
        own = joint_model.losses(base, [shares[member] for member in members])
        torch.stack(own).sum().backward()
        found.update(zip(members, (loss.item() for loss in own), strict=True))
    for run in runs:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.gradient_norm_max)
        run.loop.optimizer.step()
        run.loop.lr_scheduler.step()
        run.loop.optimizer.zero_grad()
    return [found[i] for i in range(len(shares))]


def buckets(shares: Sequence[Share], pass_tokens_max: int) -> list[list[int]]:
    """Group the indices of shares for one pass through the base, by similar width, so that little is padding."""
    groups: list[list[int]] = []
    width = num_rows = padding = 0  # of the newest group; padding in tokens
    for index in sorted(range(len(shares)), key=lambda i: -shares[i].width):
        share = shares[index]
        added = share.num_rows * (width - share.width)
        fits = (num_rows + share.num_rows) * width <= pass_tokens_max and padding + added <= _PASS_TOKENS
        if groups and fits:
            groups[-1].append(index)
            num_rows, padding = num_rows + share.num_rows, padding + added
        else:
            groups.append([index])
            width, num_rows, padding = share.width, share.num_rows, 0
    return groups


def _finish(run: _Run, base: Base, seconds: float) -> TrainResult:
    result = trainer.result_of(run.config, run.model, [{"loss": loss} for loss in run.losses], seconds)
    made = run.scratch / "result"
    output.write(output.rounded(run.model.made, run.config.save_dtype), made, base.shape)
    card.write(run.config, run.prepared, result, made)
    output.replace_output(run.config.output, made)
    return result
