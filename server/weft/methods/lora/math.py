"""LoRA: a low-rank update of a linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    y = W₀x + scaling · B A x,    scaling = alpha / rank

Deviations: with `use_rslora` the divisor is sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); with `lora_bias` the
update is scaling · (B A x + bias), as in PEFT.
Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397) is this delta on a part of the tokens: only the gates differ.
QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is this method trained on the NF4 base: nothing changes here. Deviations
from the owner's document (section 2.2): A and B are float32 in training, where float16 would lose small steps, and take
the dtype of the slots when served; and the base is not round(W · s) / s, whose grid is uniform, but NF4 as in the paper
(section 3): blocks of 64 weights are divided by their largest magnitude, and each becomes the nearest of 16 values that
are spaced as a normal distribution is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods import targets
from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, DeltaKind, Drop, Fitted, Packed, Site, SiteKind, keep, require_dropout
from weft.methods.shapes import Float

SITES = (SiteKind.LINEAR, SiteKind.HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Ranks, alphas and their modules."""

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    lora_bias: Annotated[bool, Field(description="B has a bias, inside the scaled branch.")] = False
    target_modules: Annotated[tuple[str, ...], Field(description="Ends of paths; empty for every linear module.")] = ()
    layers: targets.Layers = ()
    exclude: targets.Exclude = ()
    rank_pattern: Annotated[
        dict[str, int],
        Field(description="Ranks by the ends of modules' paths; the first that fits decides, as in PEFT."),
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        dict[str, float],
        Field(description="Alphas by the ends of modules' paths; the first that fits decides, as in PEFT."),
    ] = field(default_factory=dict)
    dropout: Annotated[float, Field(description="Share of the update's input that a training step drops.")] = 0.0
    invocation_tokens: Annotated[
        tuple[int, ...],
        Field(description="Token ids from whose last occurrence in the prompt on it acts; empty for everywhere."),
    ] = ()  # methods/activation.py

    def __post_init__(self) -> None:
        require_dropout(self.dropout)


class LoraParams(NamedTuple):
    """One site's update."""

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    scaling: float
    bias: Float[Tensor, " O"] | None = None  # scaled with B

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def rank_at(config: LoraConfig, module: str) -> int:
    """Return the rank of the update at a module path."""
    return targets.value_at(config.rank_pattern, module, config.rank)


def scaling_at(config: LoraConfig, module: str) -> float:
    """Return the factor of B A at a module path."""
    alpha = targets.value_at(config.alpha_pattern, module, config.alpha)
    rank = rank_at(config, module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def init(config: LoraConfig, site: Site, generator: torch.Generator | None = None) -> LoraParams:
    """Draw A uniformly as torch.nn.Linear does; B and its bias are zero, so the delta starts at exactly zero."""
    rank = rank_at(config, site.name)
    bound = 1 / math.sqrt(site.in_features)
    a = torch.empty(rank, site.in_features).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(site.out_features, rank)
    bias = torch.zeros(site.out_features) if config.lora_bias else None
    return LoraParams(a, b, scaling_at(config, site.name), bias)


def begin(config: LoraConfig, base: BaseShape, generator: torch.Generator, start: Callable[..., Any] = init) -> Fitted:
    """Return what `start` makes at every site that the config means."""
    config, sites = targets.place(config, base, SITES)
    targets.require_decisive("rank_pattern", config.rank_pattern, sites)
    targets.require_decisive("alpha_pattern", config.alpha_pattern, sites)
    return Fitted(config, {site.name: start(config, site, generator) for site in sites})


def delta(
    params: LoraParams, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], drop: Drop = keep
) -> Float[Tensor, "*T O"]:
    """Compute the delta to the base output `y` for the input `x`; differentiable in `params`.

    drop: dropout of the input, in training.
    """
    hidden = drop(x.to(params.a.dtype)) @ params.a.mT  # [*T, R]
    added = hidden @ params.b.mT  # [*T, O]
    if params.bias is not None:
        added = added + params.bias.to(added.dtype)
    return (added * params.scaling).to(y.dtype)


def pack(params: LoraParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Pack A [R, I] and the scaled Bᵀ [R, O]: both are read along contiguous rows. The scaled bias stays float32."""
    b = params.b.float().mT * params.scaling
    product = Packed(DeltaKind.LORA, params.rank, params.a.to(dtype).contiguous(), b.to(dtype).contiguous())
    if params.bias is None:
        return (product,)
    return (product, Packed(DeltaKind.BIAS, 0, params.bias.float() * params.scaling, None))


def unpack(packed: tuple[Packed, ...]) -> LoraParams:
    """Return views of a packed site; its scaling is already part of B and the bias."""
    product, *bias = packed
    assert product.second is not None
    return LoraParams(product.first, product.second.mT, 1.0, bias[0].first if bias else None)


def count(config: LoraConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count r(I + O) at every site, and O with a bias."""
    terms = [term(config, site) for site in sites]
    if not config.lora_bias:
        return gather("Σ R(I + O)", terms)
    biases = (Term(str(site.out_features), site.out_features) for site in sites)
    return gather("Σ R(I + O) + Σ O", [*terms, *biases])


def term(config: LoraConfig, site: Site) -> Term:
    """Return r(I + O) at one site."""
    rank, i, o = rank_at(config, site.name), site.in_features, site.out_features
    return Term(f"{rank}·({i} + {o})", rank * (i + o))


def norms(params: LoraParams) -> dict[str, float]:
    """Compute ‖ΔW‖² = tr(AᵀBᵀBA) = Σ (BᵀB) ⊙ (AAᵀ), without a matrix of the base's size."""
    a, b = params.a.double(), params.b.double()
    squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
    return {"‖ΔW‖": params.scaling * squared.sqrt().item()}
