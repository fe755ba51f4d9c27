"""Knowledge distillation: an adapter learns from another model's distribution as well as from the data.

    loss = α · CE(student, labels) + (1 - α) · τ² · KL        (Hinton et al. 2015, arXiv:1503.02531, section 2)

    forward:  KL(teacher ‖ student) = Σ_v t_v (log t_v - log s_v)   covers all the teacher's mass; the default
    reverse:  KL(student ‖ teacher) = Σ_v s_v (log s_v - log t_v)   keeps to the teacher's most likely tokens

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
    """The distribution whose expectation the divergence takes."""

    FORWARD = "forward"
    REVERSE = "reverse"


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class DistillationConfig:
    """A teacher, and its part of the loss."""

    teacher: TypedPath = Field(
        description="PEFT directory of an adapter for the same base, which then is in memory once; or a model "
        "directory with the same vocabulary."
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="Weight of the labels; the teacher has the rest.")
    temperature: float = Field(default=2.0, gt=0, description="Divisor τ of both models' logits.")
    direction: Direction = Field(
        default=Direction.FORWARD, description="forward is KL(teacher ‖ student), reverse is KL(student ‖ teacher)."
    )


def divergence(student: Tensor, teacher: Tensor, *, temperature: float, direction: Direction) -> Tensor:
    """Return τ² · KL of every row [N], from logits [N, V]; differentiable in both."""
    s = F.log_softmax(student / temperature, dim=-1)
    t = F.log_softmax(teacher / temperature, dim=-1)
    expected, other = (t, s) if direction is Direction.FORWARD else (s, t)
    return temperature**2 * (expected.exp() * (expected - other)).sum(dim=-1)


class DistilledModel(nn.Module):
    """A student whose loss includes the teacher's term. `parameters()` is the student's adapter and nothing else."""

    def __init__(self, student: TrainedModel, teacher: nn.Module, config: DistillationConfig) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # a tuple, so that it is not a submodule, and is neither trained nor saved
        self._config = config

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> Any:
        """Return the student's logits [B, T, V] and the loss; `num_items_in_batch` counts a step's learned tokens."""
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
    """Another checkpoint as a teacher: AdaptedModel's interface without an adapter."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self._base = (base,)

    def forward(self, **inputs: Tensor) -> Any:
        return self._base[0].model(use_cache=False, **inputs)


def load_teacher(path: Path, base: Base, model: ModelConfig) -> nn.Module:
    """Load the teacher at `path`. An adapter runs on `base` itself; a checkpoint is loaded as `model` specifies.

    Raises FileNotFoundError if neither is there, and ValueError if the vocabularies differ.
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
