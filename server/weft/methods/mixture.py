"""A mixture of adapters: a learned gate for each of N experts, per token and per layer.

    h' = h + Σ_i g_i(h) f_i(h)        g = normalize(top_k(softmax(W h / τ)))

h is the residual stream that enters a layer; its gates hold for all that the experts compute in that layer. There is
one pass and one cache of keys and values. (Shazeer et al. 2017, arXiv:1701.06538, has the top-k gate; Fedus et al.
2021, arXiv:2101.03961, the balancing loss.) Experts are adapters of any methods; this module holds the gate alone.

Deviations: no noise and no capacity, so that a row's gates are a function of that row; equal logits go to the expert
that comes first in the order of digests; a *null expert* may take gate that then goes to no adapter.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.methods.protocol import Method
from weft.methods.shapes import Bool, Float, Float32

_NORM_EPS = 1e-6


class Level(StrEnum):
    """The router's input: each token's own hidden state, or the mean of the prompt's input embeddings."""

    TOKEN = "token"  # noqa: S105  no password
    SEQUENCE = "sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """How gates are computed.

    top_k: experts that keep a gate. temperature: τ. level: the router's input.
    normalize: whether the gates that are kept sum to one; otherwise they are the softmax over all experts.
    shared: one router for all layers. null_expert: whether W has a last row for the null expert.
    rms_norm: h is divided by its root mean square first. absolute: logits are |W h| / τ (Arrow, Ostapenko et al. 2024,
        arXiv:2405.11157).
    """

    num_experts: int
    top_k: int
    temperature: float = 1.0
    level: Level = Level.TOKEN
    normalize: bool = True
    shared: bool = False
    null_expert: bool = False
    rms_norm: bool = False
    absolute: bool = False

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts: must be at least 1, given {self.num_experts}")
        if not 1 <= self.top_k <= self.num_choices:
            raise ValueError(f"top_k: must be 1 to {self.num_choices}, given {self.top_k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0, given {self.temperature}")

    @property
    def num_choices(self) -> int:
        """Number of rows of W."""
        return self.num_experts + self.null_expert


class MixtureParams(NamedTuple):
    """The router; M is L, or 1 if it is shared, and C is the number of choices."""

    weight: Float[Tensor, "M C hidden"]

    def at(self, layer: int) -> Float[Tensor, "C hidden"]:
        """Return the layer's W."""
        return self.weight[0 if len(self.weight) == 1 else layer]


class Steering(NamedTuple):
    """A request's bounds on the gates; None for no bound."""

    allowed: Bool[Tensor, " N"] | None = None  # all others get gate 0
    floor: Float32[Tensor, " N"] | None = None  # 0 for none: the smallest gate of an allowed expert
    ceiling: Float32[Tensor, " N"] | None = None  # infinity for none, else not below the floor: the largest gate


NO_BOUNDS = Steering()


class Expert(NamedTuple):
    """The adapter that is an expert: its digest names the content; the id is the one it was called by, or ""."""

    digest: str
    adapter_id: str = ""


class Mixture(NamedTuple):
    """A mixture fitted to a base: row i of W is expert i's, and the last row is the null expert's if there is one."""

    config: MixtureConfig
    params: MixtureParams
    experts: tuple[Expert, ...]

    def in_order(self) -> "Mixture":
        """Return the same mixture with its experts in the order of their digests, which is what breaks ties."""
        order = sorted(range(len(self.experts)), key=lambda index: self.experts[index].digest)
        rows = [*order, *range(len(order), self.config.num_choices)]
        weight = self.params.weight[:, rows]
        return Mixture(self.config, MixtureParams(weight), tuple(self.experts[index] for index in order))


def init(config: MixtureConfig, num_layers: int, hidden_size: int, generator: torch.Generator) -> MixtureParams:
    """Draw small noise: the gates start near uniform, and no two experts are alike."""
    shape = (1 if config.shared else num_layers, config.num_choices, hidden_size)
    return MixtureParams(torch.randn(shape, generator=generator) * hidden_size**-0.5 * 0.02)


def gates(
    config: MixtureConfig,
    weight: Float[Tensor, "C hidden"],
    hidden: Float[Tensor, "T hidden"],
    steering: Steering = NO_BOUNDS,
) -> Float[Tensor, "T N"]:
    """Compute the experts' gates for hidden states that enter a layer with router `weight`.

    Differentiable in both. Rows do not depend on each other.
    """
    chances = probabilities(config, weight, hidden, steering)  # [T, C]
    # A stable sort keeps the first of equal values; topk promises nothing about their order.
    order = chances.detach().sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    kept = torch.zeros_like(chances).scatter(-1, order, 1.0)
    chosen = chances * kept
    if config.normalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return steered(chosen[:, : config.num_experts], steering)


def probabilities(
    config: MixtureConfig,
    weight: Float[Tensor, "C hidden"],
    hidden: Float[Tensor, "T hidden"],
    steering: Steering = NO_BOUNDS,
) -> Float[Tensor, "T C"]:
    """Compute the softmax over all choices, before any is dropped; float32 or better."""
    h = hidden.to(weight.dtype)
    if config.rms_norm:
        h = F.rms_norm(h, h.shape[-1:], eps=_NORM_EPS)
    logits = h @ weight.mT
    if config.absolute:
        logits = logits.abs()
    logits = logits / config.temperature
    if steering.allowed is not None:
        allowed = F.pad(steering.allowed, (0, config.num_choices - config.num_experts), value=True)
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1)


def steered(chosen: Float[Tensor, "T N"], steering: Steering) -> Float[Tensor, "T N"]:
    """Return gates within floor and ceiling; the others share the rest of their former sum in proportion.

    If the bounds do not allow that sum, the bounds hold and the sum changes. A gate of 0 grows to its floor, and no
    further. (The rounds are those of flexible lengths in CSS: fix the gates that break whichever bound is broken by
    more in sum, then share again.)
    """
    if steering.floor is None and steering.ceiling is None:
        return chosen
    low = torch.zeros_like(chosen) if steering.floor is None else steering.floor.to(chosen).expand_as(chosen)
    high = torch.full_like(chosen, torch.inf) if steering.ceiling is None else steering.ceiling.to(chosen)
    if steering.allowed is not None:
        low = low * steering.allowed
    total = chosen.sum(-1, keepdim=True)
    free = chosen > 0
    fixed = torch.where(free, torch.zeros_like(chosen), torch.minimum(low, high))

    def shared() -> Float[Tensor, "T N"]:
        weight = (chosen * free).sum(-1, keepdim=True)
        left = (total - fixed.sum(-1, keepdim=True)).clamp(min=0)
        # Compute the part of the weight first, since it is at most 1: left / weight is infinite if hardly anything was
        # chosen.
        return torch.where(free, torch.where(weight > 0, chosen / weight, weight) * left, fixed)

    for _ in range(chosen.shape[-1]):
        share = shared()
        bounded = torch.minimum(share.maximum(low), high)
        excess = ((bounded - share) * free).sum(-1, keepdim=True)
        broken = free & (((excess >= 0) & (bounded > share)) | ((excess <= 0) & (bounded < share)))
        fixed = torch.where(broken, bounded, fixed)
        free = free & ~broken
    return shared()


def balance_loss(chances: Float[Tensor, "T C"], chosen: Float[Tensor, "T N"]) -> Float[Tensor, ""]:
    """Compute N Σ_i (share of rows that chose i) · (mean probability of i): 1 if all experts are used alike.

    chosen: gates; the share has no gradient. (arXiv:2101.03961, equation 4; there top_k is 1, here a row counts for
    each expert that it chose, divided by their number.)
    """
    num_experts = chosen.shape[-1]
    used = (chosen.detach() > 0).to(chances.dtype)
    share = (used / used.sum(-1, keepdim=True).clamp(min=1)).mean(0)
    return num_experts * (share * chances[:, :num_experts].mean(0)).sum()


METHOD = Method(name="mixture")
