"""IA³: element-wise scaling of activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    key, value:    y ← l ⊙ W₀x        post(x, y) = (l - 1) ⊙ y
    feed-forward:  y ← W₀(l ⊙ x)      pre(x)     = (l - 1) ⊙ x

As in PEFT, the scaled output includes the base bias. Deviation from the owner's count of 2d per layer: a layer has one
vector per key, value and feed-forward site, so d_kv + d_kv + d_ff numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods import targets
from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, DeltaKind, Fitted, Packed, Site, SiteKind
from weft.methods.shapes import Float

# The paper's sites by their names in bases: keys and values, fused or separate, and the feed-forward input last. GPT-2
# has one name for the ends of both sublayers, so that attention's end is scaled there too.
MODULES = (("k_proj", "v_proj", "down_proj"), ("qkv_proj", "down_proj"), ("c_attn", "c_proj"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Config:
    """The modules that are scaled, and those among them that are scaled at their input."""

    target_modules: Annotated[tuple[str, ...], Field(description="Ends of paths; empty for every linear module.")] = ()
    feedforward_modules: Annotated[tuple[str, ...], Field(description="Those of them scaled at their input.")] = ()
    layers: targets.Layers = ()
    exclude: targets.Exclude = ()


class Ia3Params(NamedTuple):
    """One site's vector; F is I if the input is scaled, O if the output is."""

    scale: Float[Tensor, " F"]
    is_feedforward: bool


def init(config: Ia3Config, site: Site) -> Ia3Params:
    """Return ones: the delta starts at exactly zero."""
    is_feedforward = targets.any_names(config.feedforward_modules, site.name)
    return Ia3Params(torch.ones(site.in_features if is_feedforward else site.out_features), is_feedforward)


def fit(config: Ia3Config, base: BaseShape) -> Ia3Config:
    """Return the config with the paper's sites under the base's names."""
    suffixes = {site.suffix for site in base.sites.values()}
    for modules in MODULES:
        if suffixes >= set(modules):
            return replace(config, target_modules=modules, feedforward_modules=modules[-1:])
    raise ValueError(f"target_modules: must be given for ia3 on this base, which has {', '.join(sorted(suffixes))}")


def begin(config: Ia3Config, base: BaseShape, generator: torch.Generator) -> Fitted:
    """Return ones at every site that the config means; nothing is drawn."""
    config, sites = targets.place(config, base, (SiteKind.LINEAR,))
    targets.require_named("feedforward_modules", config.feedforward_modules, sites)
    return Fitted(config, {site.name: init(config, site) for site in sites})


def pre(params: Ia3Params, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T I"] | None:
    """Compute the delta of a feed-forward vector to the input `x`."""
    return _excess(params.scale, x) if params.is_feedforward else None


def post(params: Ia3Params, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"] | None:
    """Compute the delta of a key or value vector to the base output `y`."""
    return None if params.is_feedforward else _excess(params.scale, y)


def _excess(scale: Float[Tensor, " F"], activation: Float[Tensor, "*T F"]) -> Float[Tensor, "*T F"]:
    return ((scale - 1) * activation.to(scale.dtype)).to(activation.dtype)


def pack(params: Ia3Params, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Pack the vector in float32 whatever the slots hold: a bfloat16 step near 1 is 0.4 %, and vectors are small."""
    kind = DeltaKind.SCALE_INPUT if params.is_feedforward else DeltaKind.SCALE_OUTPUT
    return (Packed(kind, 0, params.scale.float().contiguous(), None),)


def unpack(packed: tuple[Packed, ...]) -> Ia3Params:
    """Return a view of a packed site."""
    (vector,) = packed
    return Ia3Params(vector.first, vector.kind is DeltaKind.SCALE_INPUT)


def count(config: Ia3Config, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count O at every key and value site, I at every feed-forward site."""
    inputs = config.feedforward_modules
    sizes = (s.in_features if targets.any_names(inputs, s.name) else s.out_features for s in sites)
    return gather("Σ O + Σ I", (Term(str(size), size) for size in sizes))


def norms(params: Ia3Params) -> dict[str, float]:
    """Return the distance from the vector that scales nothing."""
    return {"‖l - 1‖": (params.scale.float() - 1).norm().item()}
