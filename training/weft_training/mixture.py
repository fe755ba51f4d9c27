"""A mixture as a trainable module: a router over experts on a frozen base, computed by `weft.methods`.

    h' = h + Σ_i g_i(h) f_i(h)      L = cross entropy + balance_weight · mean over layers of balance_loss

The gates and the driver are those of serving. This module decides which rows the router reads and what is learned.
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from weft.config import CHECKS, Number, TypedPath
from weft.methods import mixture
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.mixture import Level, MixtureConfig, MixtureParams
from weft.model.loader import Base
from weft_training import expert as experts
from weft_training.data import IGNORED
from weft_training.expert import TrainedExpert

NAME = mixture.METHOD.name


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class MixtureTrainConfig:
    """Settings of a router's training and of its gates."""

    experts: tuple[TypedPath, ...] = Field(
        default=(), description="PEFT directories of adapters for the same base, of any methods that act at modules."
    )
    top_k: int = Field(default=2, description="Experts that keep a gate.")
    temperature: float = Field(default=1.0, description="Divisor of the logits.")
    level: Level = Field(
        default=Level.TOKEN,
        description="token, or sequence, which reads the mean of the prompt's input embeddings, once.",
    )
    normalize: bool = Field(default=True, description="Make the gates that are kept sum to one.")
    shared: bool = Field(default=False, description="One router for all layers.")
    null_expert: bool = Field(default=False, description="Let a part of the gates go to no expert.")
    rms_norm: bool = Field(
        default=True, description="Divide the hidden state that the router reads by its root mean square."
    )
    balance_weight: Number = Field(
        default=0.0, description="Weight of the loss that is least if all experts are used equally; 0 for none."
    )
    train_experts: bool = Field(
        default=False, description="Train the experts too; the trained ones are written into `experts/` of the output."
    )

    def __post_init__(self) -> None:
        if self.top_k == 1 and self.normalize:
            # A single kept gate would be 1 whatever the router's logits, so no gradient would reach it.
            raise ValueError("top_k must be at least 2 if normalize is true, or nothing is learned, given 1")
        if self.experts:
            self.gates()

    def gates(self) -> MixtureConfig:
        """Return the config of the mixture itself. Raises ValueError for settings that no mixture can have."""
        if not self.experts:
            raise ValueError("experts must name at least 1 directory, given none")
        same = {field.name for field in fields(MixtureConfig)} & {field.name for field in fields(self)}
        return MixtureConfig(num_experts=len(self.experts), **{name: getattr(self, name) for name in same})


class TrainedMixture(NamedTuple):
    """A trained router and its experts. writes_experts: whether the experts were trained, and are written with it."""

    config: MixtureConfig
    params: MixtureParams
    experts: Sequence[TrainedExpert]
    writes_experts: bool


def begin(config: MixtureTrainConfig, base: Base, generator: torch.Generator) -> "MixtureModel":
    """Return a base with its experts and an untrained router. Raises the errors of `expert.read`."""
    gates = config.gates()
    found = experts.read(config.experts, base.shape)
    params = mixture.init(gates, base.shape.num_layers, base.shape.embedding_size, generator)
    made = TrainedMixture(gates, params, found, config.train_experts)
    return MixtureModel(base, made, balance_weight=config.balance_weight)


class Router:
    """Gates of one batch, from each token's state or from the mean over each row's prompt.

    gates, chances: the experts' gates [B · T, N], and the router's softmax [B · T, C], of every layer so far.
    """

    def __init__(self, config: MixtureConfig, params: MixtureParams) -> None:
        self._config = config
        self._params = params
        self._prompts: Tensor | None = None
        self._pooled: Tensor | None = None
        self.gates: list[Tensor] = []
        self.chances: list[Tensor] = []

    def begin(self, prompts: Tensor) -> None:
        """Begin a batch; `prompts` [B, T] is 1 on the tokens of its prompts. Tokens generated later use the same."""
        self._prompts = prompts
        self._pooled = None

    def enter(self, layer: int, rows: Tensor) -> None:
        """Begin a layer, with the hidden states `rows` [B · T, hidden]."""
        seen = rows if self._config.level is Level.TOKEN else self._means(rows)
        if layer == 0:
            self.gates, self.chances = [], []
        weight = self._params.at(layer)
        self.gates.append(mixture.gates(self._config, weight, seen))
        self.chances.append(mixture.probabilities(self._config, weight, seen))

    def gates_of(self, expert: int) -> Tensor:
        """Return one expert's gates [B · T] in the layer being computed."""
        return self.gates[-1][:, expert]

    def _means(self, rows: Tensor) -> Tensor:
        assert self._prompts is not None, "no batch has begun"
        if self._pooled is None:  # the first layer's input: the embeddings
            weight = self._prompts.to(rows.device, torch.float32)[..., None]
            states = rows.view(*self._prompts.shape, -1).to(torch.promote_types(rows.dtype, torch.float32))
            self._pooled = (states * weight).sum(1) / weight.sum(1)
        return self._pooled.repeat_interleave(len(rows) // len(self._pooled), dim=0)


class MixtureModel(nn.Module):
    """Base with a mixture on every row.

    `parameters()` is what is trained, in float32, and nothing else: the router, and the experts if they are trained.
    The base is no submodule, as in AdaptedModel.
    """

    method = NAME
    num_virtual_tokens = 0
    invocation_tokens: tuple[int, ...] = ()

    def __init__(self, base: Base, made: TrainedMixture, *, balance_weight: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self._balance_weight = balance_weight
        self.weight = nn.Parameter(made.params.weight.to(base.device, torch.float32, copy=True))
        self.tensors = nn.ParameterList()

        def held(tensor: Tensor) -> Tensor:
            tensor = tensor.to(base.device, torch.float32, copy=True)
            return nn.Parameter(tensor) if made.writes_experts else tensor

        placed = [one.mapped(held) for one in made.experts]
        if made.writes_experts:
            self.tensors.extend(tensor for one in placed for tensor in one.adapter.tensors())
        # The optimizer updates the parameters in place, so this and the driver always hold the newest values.
        self._made = made._replace(params=MixtureParams(self.weight), experts=placed)
        self.router = Router(made.config, self._made.params)
        self.driver = ReferenceDriver(
            [
                Segment(one.adapter.method, one.adapter.sites, gates=partial(self.router.gates_of, index))
                for index, one in enumerate(placed)
            ],
            (self.router.enter,),
        )

    @property
    def made(self) -> TrainedMixture:
        """The mixture with its current parameters, as it would be written."""
        return self._made

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained and written."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Digests of what the run reads besides its data and its base."""
        return tuple(one.digest for one in self._made.experts)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **loss_options: Any
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], and the loss if labels are given. All inputs are [B, T], padded on the right."""
        self.router.begin(_prompts(attention_mask, labels))
        with self.base.context.use(self.driver):
            out = self.base.model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, **loss_options
            )
        if labels is not None and self._balance_weight:
            share = _share(labels, loss_options.get("num_items_in_batch"))
            out.loss = out.loss + self._balance_weight * share * self._balance(attention_mask)
        return out

    def _balance(self, attention_mask: Tensor) -> Tensor:
        """Return the mean over layers of the balance loss; padding does not count."""
        real = attention_mask.reshape(-1).bool()
        layers = zip(self.router.chances, self.router.gates, strict=True)
        return torch.stack([mixture.balance_loss(chances[real], gates[real]) for chances, gates in layers]).mean()

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Return prompts [B, T], padded on the left, with continuations [B, T + N]; the options are transformers'."""
        self.router.begin(attention_mask)
        with self.base.context.use(self.driver):
            return self.base.model.generate(input_ids, attention_mask=attention_mask, **options)


def _prompts(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """Return [B, T]: 1 before the first learned token, at least on each row's first; without labels the mask."""
    if labels is None:
        return attention_mask
    begun = (labels != IGNORED).cumsum(1) > 0
    begun[:, 0] = False
    return attention_mask * ~begun


def _share(labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """Return this pass's share of the step's learned tokens, by which the loss of the labels is weighted too."""
    return 1.0 if num_items is None else (labels[:, 1:] != IGNORED).sum() / num_items
