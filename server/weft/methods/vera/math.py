"""VeRA: two frozen random matrices for all sites, and two trained vectors for each.

Kopiczko et al. 2024, arXiv:2310.11454, section 3.1.

    y = W₀x + Λ_b B Λ_d A x        Λ_b, Λ_d: diagonal matrices of the vectors λ_b and λ_d

A site smaller than the largest takes the first columns of A and the first rows of B, as in PEFT. A trained adapter
folds into a LoRA with Λ_d A and Λ_b B: it is stored as vectors, and served at LoRA's cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods import targets
from weft.methods.count import Count, Term, gather
from weft.methods.lora import math as lora
from weft.methods.protocol import BaseShape, Drop, Fitted, Packed, Site, SiteKind, keep, require_dropout
from weft.methods.shapes import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraConfig:
    """The rank, and the modules that have vectors."""

    rank: int = 64
    target_modules: Annotated[tuple[str, ...], Field(description="Ends of paths; empty for every linear module.")] = ()
    layers: targets.Layers = ()
    exclude: targets.Exclude = ()
    d_initial: Annotated[float, Field(description="Initial value of λ_d; λ_b begins as zero.")] = 0.1
    dropout: Annotated[float, Field(description="Share of the update's input that a training step drops.")] = 0.0

    def __post_init__(self) -> None:
        require_dropout(self.dropout)
        if self.rank < 1:
            raise ValueError(f"rank: must be at least 1, given {self.rank}")


class Projection(NamedTuple):
    """The frozen matrices, one pair for all sites; I and O are those of the largest."""

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]


class VeraParams(NamedTuple):
    """One site's vectors, and the matrices that they scale."""

    lambda_d: Float[Tensor, " R"]
    lambda_b: Float[Tensor, " O"]
    in_features: int
    projection: Projection


def begin(config: VeraConfig, base: BaseShape, generator: torch.Generator) -> Fitted:
    """Draw a projection as PEFT does, and make vectors at every site of the config: the delta starts at zero."""
    config, sites = targets.place(config, base, (SiteKind.LINEAR,))

    def draw(num_rows: int, num_columns: int) -> Tensor:
        bound = math.sqrt(6 / num_columns)  # Kaiming's, for ReLU
        return torch.empty(num_rows, num_columns).uniform_(-bound, bound, generator=generator)

    a = draw(config.rank, max(site.in_features for site in sites))
    projection = Projection(a, draw(max(site.out_features for site in sites), config.rank))
    return Fitted(config, {site.name: init(config, site, projection) for site in sites})


def init(config: VeraConfig, site: Site, projection: Projection) -> VeraParams:
    """Return constant λ_d and zero λ_b."""
    lambda_d = torch.full((config.rank,), config.d_initial)
    return VeraParams(lambda_d, torch.zeros(site.out_features), site.in_features, projection)


def delta(
    params: VeraParams | lora.LoraParams, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], drop: Drop = keep
) -> Float[Tensor, "*T O"]:
    """Compute the delta to the base output `y` for the input `x`; differentiable in the vectors.

    drop: dropout of the input, in training.
    """
    if isinstance(params, lora.LoraParams):
        return lora.delta(params, x, y, drop)
    a, b = (matrix.to(params.lambda_d) for matrix in matrices(params))
    hidden = drop(x.to(a.dtype)) @ a.mT * params.lambda_d  # [*T, R]
    return (hidden @ b.mT * params.lambda_b).to(y.dtype)


def matrices(params: VeraParams) -> Projection:
    """Return A [R, I] and B [O, R] of the site, as views."""
    return Projection(params.projection.a[:, : params.in_features], params.projection.b[: len(params.lambda_b)])


def fold(params: VeraParams) -> lora.LoraParams:
    """Return the LoRA that equals the update, in float32."""
    a, b = (matrix.float() for matrix in matrices(params))
    return lora.LoraParams(a * params.lambda_d.float()[:, None], b * params.lambda_b.float()[:, None], 1.0)


def pack(params: VeraParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Pack LoRA's two matrices."""
    return lora.pack(fold(params), dtype)


def count(config: VeraConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count R and O at every site; the projection is not trained."""
    terms = (Term(f"({config.rank} + {site.out_features})", config.rank + site.out_features) for site in sites)
    return gather("Σ (R + O)", terms)


def norms(params: VeraParams) -> dict[str, float]:
    """Return LoRA's ‖ΔW‖."""
    return lora.norms(fold(params))
