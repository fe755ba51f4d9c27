"""Configuration of one training run, and its layout in a recipe."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, SkipValidation
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

from weft.config import CHECKS, Count, ModelConfig, Number, Positive, TypedPath
from weft_training.distillation import DistillationConfig
from weft_training.trained import TrainedConfig, name_of


class Optimizer(StrEnum):
    """The optimizer, which turns gradients into steps."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"


class SaveDtype(StrEnum):
    """The dtype in which an adapter is written; it is trained in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Schedule(StrEnum):
    """Course of the learning rate after its warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True, kw_only=True, config={**CHECKS, "arbitrary_types_allowed": True})
class TrainConfig:
    """Configuration of one training run; recipes have its fields in sections."""

    model: ModelConfig
    adapter: SkipValidation[TrainedConfig] = Field(description="The method's config, whose type determines the method.")
    output: TypedPath = Field(description="PEFT directory to write; with `overwrite` it may exist already.")
    data: tuple[TypedPath, ...] = Field(default=(), description="JSON Lines files, unless `train` is given examples.")
    num_steps: Positive = Field(default=200, description="Optimizer steps; examples that run out are shuffled again.")
    batch_size: Positive = Field(
        default=16, description="Examples of one step, over all processes; packed rows if `packing`."
    )
    accumulation_steps: Positive = Field(
        default=1, description="Parts in which a step is computed; the result is the same."
    )
    optimizer: Optimizer = Field(
        default=Optimizer.ADAMW,
        description="adamw; adamw_8bit, bitsandbytes' AdamW whose moments take 8 bits in tensors of at least 4,096 "
        "numbers; or paged_adamw_8bit, the same in memory that may leave the GPU. On a CPU, "
        "adamw_8bit runs instead, with a warning: there is nothing to page.",
    )
    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        description="Peak learning rate, after `num_warmup_steps` of linear growth; `schedule` then decays it to zero "
        "or keeps it.",
    )
    schedule: Schedule = Field(default=Schedule.COSINE, description="Course of the learning rate after its warm-up.")
    num_warmup_steps: Count = Field(default=0, description="Steps in which the learning rate grows.")
    weight_decay: Number = Field(default=0.0, description="AdamW's decay, per unit of learning rate.")
    gradient_norm_max: float = Field(
        default=1.0, gt=0, description="Gradients with a larger norm are scaled down to it."
    )
    autocast: bool = Field(default=False, description="bfloat16 for what torch deems safe; the adapter stays float32.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations inside layers to save memory."
    )
    seed: int = Field(
        default=0, description="Seed of the adapter's start, the examples' order and the evaluation share."
    )
    evaluation_data: tuple[TypedPath, ...] = Field(default=(), description="Files that are evaluated, not learned.")
    evaluation_share: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the data that is evaluated, not learned."
    )
    evaluate_every: Count = Field(
        default=0,
        description="Steps between evaluations; 0 evaluates after the last step only. The best step's adapter is kept.",
    )
    patience: Count = Field(
        default=0, description="Evaluations without a new lowest loss that end training; 0 for never."
    )
    max_model_len: int | None = Field(
        default=None,
        description="Longest request of the server that the adapter is for; null takes the base's limit. It bounds "
        "the rows, and a base whose rotary factors depend on the length takes those of this length.",
    )
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Tokens of one example; null takes the base's limit, or `max_model_len`."
    )
    packing: bool = Field(
        default=False, description="Put short examples together in rows of at most `max_length` tokens."
    )
    distillation: DistillationConfig | None = None
    checkpoint_every: Count = Field(
        default=0, description="Steps between checkpoints (`<output>.checkpoints`); 0 for none."
    )
    resume: bool = Field(default=False, description="Continue from the last checkpoint, if there is one.")
    overwrite: bool = Field(
        default=False, description="Replace an adapter at the output, and another run's checkpoints."
    )
    tensorboard: TypedPath | None = Field(default=None, description="Directory for TensorBoard's event files.")
    save_dtype: SaveDtype = Field(
        default=SaveDtype.FLOAT32, description="Type of the numbers in files; bfloat16 halves their size."
    )

    def __post_init__(self) -> None:
        if self.num_warmup_steps > self.num_steps:
            raise ValueError(f"num_warmup_steps must be 0 to {self.num_steps}, given {self.num_warmup_steps}")
        if self.evaluation_share and self.evaluation_data:
            raise ValueError(f"evaluation_share must be 0 beside evaluation_data, given {self.evaluation_share}")
        for knob in ("evaluate_every", "patience"):
            if getattr(self, knob) and not self.evaluates:
                raise ValueError(f"{knob} must be 0 without evaluation data, given {getattr(self, knob)}")
        if self.resume and not self.checkpoint_every:
            raise ValueError("resume must be false if checkpoint_every is 0, given true")

    @property
    def evaluates(self) -> bool:
        return bool(self.evaluation_data or self.evaluation_share)


def optimizer_on(device_type: str, config: TrainConfig) -> Optimizer:
    """Return the optimizer that runs on the device: paging needs a GPU, 8-bit moments do not."""
    if config.optimizer == Optimizer.PAGED_ADAMW_8BIT and device_type != "cuda":
        return Optimizer.ADAMW_8BIT
    return config.optimizer


# The fields of TrainConfig that are sections of their own, and the places of the others. A field without a place here
# is in `optimization`, under its own name.
SECTIONS = ("model", "adapter", "distillation")
_PLACES: Mapping[str, str] = {
    "max_model_len": "model.max_model_len",  # beside ModelConfig's fields
    "data": "data.train",
    "evaluation_data": "data.evaluation",
    "evaluation_share": "data.evaluation_share",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "output": "output.path",
    "overwrite": "output.overwrite",
    "checkpoint_every": "output.checkpoint_every",
    "resume": "output.resume",
    "tensorboard": "output.tensorboard",
    "save_dtype": "output.save_dtype",
}


def place_of(field: str) -> tuple[str, str]:
    """Return section and key of a field of TrainConfig that is no section itself."""
    section, _, name = _PLACES.get(field, f"optimization.{field}").partition(".")
    return section, name


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """Return the sections of a run's config, for YAML."""
    values = to_jsonable_python(config)
    model, adapter, distillation = (values.pop(section) for section in SECTIONS)
    recipe: dict[str, Any] = {
        "model": model,
        "adapter": {"method": name_of(config.adapter), **adapter},
        "data": {},
        "optimization": {},
        "output": {},
    }
    for field, value in values.items():
        section, name = place_of(field)
        recipe[section][name] = value
    return recipe if distillation is None else recipe | {"distillation": distillation}
