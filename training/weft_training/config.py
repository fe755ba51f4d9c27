"""What one training run is told."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from weft.config import ModelConfig
from weft_training.distillation import DistillationConfig
from weft_training.trained import TrainedConfig


class Optimizer(StrEnum):
    """What turns gradients into steps."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"


class SaveDtype(StrEnum):
    """What the numbers of an adapter are written as; they are trained in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Schedule(StrEnum):
    """How the learning rate goes on after its warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run.

    adapter: the method's config, or a mixture's; its type says which.
    data: JSON Lines files; not needed where the examples are given to `train`.
    output: the PEFT directory to make; with `overwrite` it may be there already.
    num_steps: optimizer steps; the examples are shuffled anew each time they are used up.
    batch_size: examples of one step, over all processes; with `packing`, packed rows.
    accumulation_steps: parts in which a step's examples are computed one after the other; the result is the same.
    optimizer: adamw; adamw_8bit, bitsandbytes' AdamW whose moments take 8 bits in tensors of at least 4,096 numbers;
        or paged_adamw_8bit, the same in memory that may leave the GPU. A CPU has nothing to page: adamw_8bit runs
        there, and a warning says so.
    learning_rate: its peak, after `num_warmup_steps` of linear growth; `schedule` then takes it to zero or keeps it.
    schedule: what the learning rate does after its warm-up.
    num_warmup_steps: steps in which the learning rate grows.
    weight_decay: of AdamW, per unit of learning rate.
    gradient_norm_max: longer gradients are shortened to it.
    autocast: compute in bfloat16 what torch's autocast deems safe; the adapter itself stays in float32.
    gradient_checkpointing: keep the activations of layer borders only and compute the others again.
    seed: of the adapter's start, the order of the examples and the evaluation share.
    evaluation_data: files that are evaluated and not learned.
    evaluation_share: share of the data, 0 to 1, that is evaluated and not learned.
    evaluate_every: steps between evaluations; 0 evaluates after the last step only. The best step's adapter is kept.
    patience: evaluations without a new lowest loss after which training stops; 0 for never.
    max_model_len: longest request of the server that the adapter is for; null takes the base's limit. It bounds the
        rows, and a base whose rotary factors depend on the length takes those of this one.
    max_length: tokens of one example; null takes the base's limit, or `max_model_len`.
    packing: put several short examples in one row of at most `max_length` tokens.
    checkpoint_every: steps between checkpoints, in `<output>.checkpoints`; 0 for none.
    resume: go on from the last checkpoint, if there is one.
    overwrite: replace an adapter that is at the output, and checkpoints of another run for it.
    tensorboard: directory for TensorBoard's event files.
    save_dtype: what the adapter is rounded to when it is written; bfloat16 halves its files.
    """

    model: ModelConfig
    adapter: TrainedConfig
    output: Path
    data: Path | tuple[Path, ...] | None = None
    num_steps: int = 200
    batch_size: int = 16
    accumulation_steps: int = 1
    optimizer: Optimizer = Optimizer.ADAMW
    learning_rate: float = 2e-4
    schedule: Schedule = Schedule.COSINE
    num_warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_norm_max: float = 1.0
    autocast: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluation_data: tuple[Path, ...] = ()
    evaluation_share: float = 0.0
    evaluate_every: int = 0
    patience: int = 0
    max_model_len: int | None = None
    max_length: int | None = None
    packing: bool = False
    distillation: DistillationConfig | None = None
    checkpoint_every: int = 0
    resume: bool = False
    overwrite: bool = False
    tensorboard: Path | None = None
    save_dtype: SaveDtype = SaveDtype.FLOAT32

    def __post_init__(self) -> None:
        for knob in ("num_steps", "batch_size", "accumulation_steps"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1, given {getattr(self, knob)}")
        for knob in ("learning_rate", "gradient_norm_max"):
            if not getattr(self, knob) > 0:
                raise ValueError(f"{knob} must be above 0, given {getattr(self, knob)}")
        for knob in ("weight_decay", "evaluate_every", "patience", "checkpoint_every"):
            if getattr(self, knob) < 0:
                raise ValueError(f"{knob} must be at least 0, given {getattr(self, knob)}")
        if not 0 <= self.num_warmup_steps <= self.num_steps:
            raise ValueError(f"num_warmup_steps must be 0 to {self.num_steps}, given {self.num_warmup_steps}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, given {self.max_length}")
        if not 0 <= self.evaluation_share < 1:
            raise ValueError(f"evaluation_share must be at least 0 and below 1, given {self.evaluation_share}")
        if self.evaluation_share and self.evaluation_data:
            raise ValueError(f"evaluation_share must be 0 beside evaluation_data, given {self.evaluation_share}")
        for knob in ("evaluate_every", "patience"):
            if getattr(self, knob) and not self.evaluates:
                raise ValueError(f"{knob} must be 0 without evaluation data, given {getattr(self, knob)}")
        if self.resume and not self.checkpoint_every:
            raise ValueError("resume must be false where checkpoint_every is 0, given true")

    @property
    def evaluates(self) -> bool:
        return bool(self.evaluation_data or self.evaluation_share)


def optimizer_on(device_type: str, config: TrainConfig) -> Optimizer:
    """Return the optimizer that runs there: paging takes a GPU, 8-bit moments do not."""
    if config.optimizer == Optimizer.PAGED_ADAMW_8BIT and device_type != "cuda":
        return Optimizer.ADAMW_8BIT
    return config.optimizer
