"""BitFit: trained biases and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199, section 3).

    y = W₀x + bias + b        out = norm(x) + b

Deviations: b is what training adds to the bias, not the new bias, so that adapters compose and the delta starts at
zero; and it also acts on linear modules that have no bias, which is most of them in models of the Llama type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods import targets
from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, DeltaKind, Fitted, Packed, Site, SiteKind
from weft.methods.shapes import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class BitfitConfig:
    """The modules that get a bias: linear ones, the output head, and norms that have one."""

    target_modules: Annotated[
        tuple[str, ...], Field(description="Ends of paths; empty for linear modules and norms.")
    ] = ()
    layers: targets.Layers = ()
    exclude: targets.Exclude = ()


class BitfitParams(NamedTuple):
    """One site's bias. `is_norm` marks the bias of a norm, which has a key of its own in files."""

    bias: Float[Tensor, " O"]
    is_norm: bool = False


def init(config: BitfitConfig, site: Site) -> BitfitParams:
    """Return zeros: the delta starts at exactly zero."""
    return BitfitParams(torch.zeros(site.out_features), site.kind is SiteKind.NORM)


def begin(config: BitfitConfig, base: BaseShape, generator: torch.Generator) -> Fitted:
    """Return zeros at every site that the config means; nothing is drawn."""
    config, sites = targets.place(config, base, tuple(SiteKind), usual=(SiteKind.LINEAR, SiteKind.NORM))
    return Fitted(config, {site.name: init(config, site) for site in sites})


def delta(params: BitfitParams, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
    """Compute the delta to the base output `y`: the same for every row."""
    return params.bias.to(y.dtype).expand_as(y)


def pack(params: BitfitParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Pack the bias in float32 whatever the slots hold: it is small, and the sum is rounded once."""
    return (Packed(DeltaKind.BIAS, 0, params.bias.float().contiguous(), None),)


def unpack(packed: tuple[Packed, ...]) -> BitfitParams:
    """Return a view of a packed site, which does not record the kind of its module."""
    (bias,) = packed
    return BitfitParams(bias.first)


def count(config: BitfitConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count O at every site."""
    return gather("Σ O", (Term(str(site.out_features), site.out_features) for site in sites))
