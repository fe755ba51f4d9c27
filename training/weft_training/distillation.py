"""Knowledge distillation: an adapter that learns from another model's distribution beside the data.

    loss = α · CE(student, labels) + (1 - α) · τ² · KL        (Hinton et al. 2015, arXiv:1503.02531, section 2)

    forward:  KL(teacher ‖ student) = Σ_v t_v (log t_v - log s_v)   covers all the teacher says; the habit
    reverse:  KL(student ‖ teacher) = Σ_v s_v (log s_v - log t_v)   keeps to what the teacher finds likely

s and t are the softmax of the logits divided by τ; both terms are means over the learned tokens. Deviations from the
owner's formula: its L_KL(f, f_teacher) names no direction, so that is a choice, and it has no temperature; the factor
τ² keeps the gradient's size when τ changes, and at τ = 1 the formula is the owner's.
"""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import CHECKS, ModelConfig, TypedPath
from weft.methods.checkpoint import directory
from weft.model.loader import Base
from weft_training import adapter as adapters
from weft_training import base as bases
from weft_training.adapter import AdaptedModel
from weft_training.data import IGNORED
from weft_training.trained import TrainedModel


class Direction(StrEnum):
    """Whose expectation the divergence is."""

    FORWARD = "forward"
    REVERSE = "reverse"


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class DistillationConfig:
    """A teacher, and how much of the loss is its own."""

    teacher: TypedPath = Field(
        description="An adapter's PEFT directory for the same base, which then is in memory once; or a model directory "
        "of the same vocabulary."
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="Weight of the labels; the rest is the teacher's.")
    temperature: float = Field(default=2.0, gt=0, description="Of both distributions.")
    direction: Direction = Field(default=Direction.FORWARD, description="forward: KL(teacher ‖ student).")


def divergence(student: Tensor, teacher: Tensor, *, temperature: float, direction: Direction) -> Tensor:
    """τ² · KL of every row [N], from logits [N, V]; differentiable in both."""
    s = F.log_softmax(student / temperature, dim=-1)
    t = F.log_softmax(teacher / temperature, dim=-1)
    expected, other = (t, s) if direction is Direction.FORWARD else (s, t)
    return temperature**2 * (expected.exp() * (expected - other)).sum(dim=-1)


class DistilledModel(nn.Module):
    """A student whose loss has the teacher's part. `parameters()` is the student's adapter and nothing else."""

    def __init__(self, student: TrainedModel, teacher: nn.Module, config: DistillationConfig) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule and nothing trains or saves it
        self._config = config

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> Any:
        """The student's logits [B, T, V] and the loss; `num_items_in_batch` learned tokens are in the whole step."""
        counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        out = self.student(labels=labels, **inputs, **counted)
        with torch.no_grad():
            taught = self._teacher[0](**inputs).logits.detach()
        learned = labels[:, 1:] != IGNORED  # position t predicts the token at t + 1
        rows = divergence(
            out.logits[:, :-1][learned].float(),
            taught[:, :-1][learned].float(),
            temperature=self._config.temperature,
            direction=self._config.direction,
        )
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        alpha = self._config.alpha
        return CausalLMOutputWithPast(loss=alpha * out.loss + (1 - alpha) * rows.sum() / count, logits=out.logits)


class _WholeModel(nn.Module):
    """Another checkpoint as a teacher: what AdaptedModel is without an adapter."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self._base = (base,)

    def forward(self, **inputs: Tensor) -> Any:
        return self._base[0].model(use_cache=False, **inputs)


def load_teacher(path: Path, base: Base, model: ModelConfig) -> nn.Module:
    """The teacher at `path`. An adapter runs on `base` itself; a checkpoint is held as `model` says.

    Raises FileNotFoundError where there is neither, ValueError where its vocabulary is another one.
    """
    if (path / directory.CONFIG_FILE).is_file():
        return AdaptedModel(base, adapters.read(path, base.shape)).requires_grad_(False)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"teacher: {path} holds neither {directory.CONFIG_FILE} nor config.json")
    whole = bases.load(replace(model, path=path))
    if whole.vocab_size != base.vocab_size or whole.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ValueError(
            f"teacher: must have the base's vocabulary ({base.vocab_size} tokens), given {path} with {whole.vocab_size}"
        )
    return _WholeModel(whole)
