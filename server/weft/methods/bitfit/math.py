"""BitFit: trained biases and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199, section 3).

    y = W₀x + bias + b        out = norm(x) + b

Deviations: b is what training adds to the bias, not the new bias, so that adapters compose and the delta starts at
zero; and it acts also on linear modules that have no bias, which is most of them in models of the Llama type.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BitfitConfig:
    """Which modules get a bias: linear ones, the output head, and norms that have one."""

    target_modules: Annotated[
        tuple[str, ...], Field(description="Ends of paths; empty for linear modules and norms.")
    ] = ()
    layers: targets.Layers = ()
    exclude: targets.Exclude = ()


class BitfitParams(NamedTuple):
    """One site's bias. `is_norm` says that the site is a norm: its file spells that otherwise."""

    bias: Tensor  # [O]
    is_norm: bool = False


def init(config: BitfitConfig, site: Site) -> BitfitParams:
    """Zeros: the delta starts at exactly zero."""
    del config
    return BitfitParams(torch.zeros(site.out_features), site.kind is SiteKind.NORM)


def begin(config: BitfitConfig, base: BaseShape, generator: torch.Generator) -> Fitted:
    """Zeros at every site that the config means; nothing is drawn."""
    del generator
    config, sites = targets.place(config, base, tuple(SiteKind), usual=(SiteKind.LINEAR, SiteKind.NORM))
    return Fitted(config, {site.name: init(config, site) for site in sites})


def delta(params: BitfitParams, x: Tensor, y: Tensor) -> Tensor:
    """What BitFit adds to the base output `y` [*T, O]: the same to every row."""
    del x
    return params.bias.to(y.dtype).expand_as(y)


def pack(params: BitfitParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """The bias in float32 whatever the slots hold: it is small, and the sum is rounded once."""
    del dtype
    return (Packed(DeltaKind.BIAS, 0, params.bias.float().contiguous(), None),)


def unpack(packed: tuple[Packed, ...]) -> BitfitParams:
    """View of a packed site, which does not say what kind of module it is at."""
    (bias,) = packed
    return BitfitParams(bias.first)


def count(config: BitfitConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """O at every site."""
    del config, base
    return gather("Σ O", (Term(str(site.out_features), site.out_features) for site in sites))
