"""Prefix tuning: trained keys and values before the first token (Li and Liang 2021, arXiv:2101.00190, section 4).

    Attention(Q, [P_K; K], [P_V; V])   in every layer

The keys are stored as attention reads them: they are not rotated, and real tokens take positions from P on (as in
PEFT). The paper's reparameterization P = MLP(R) (section 4.3) belongs to training: only P itself is saved and served.
It can be PEFT's, one MLP for keys and values, or the owner's document's, P_K = MLP_K(R) and P_V = MLP_V(R).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, Site, VirtualKV
from weft.methods.shapes import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixConfig:
    """The number of keys and values, and how training reaches them."""

    num_virtual_tokens: Annotated[int, Field(description="Virtual positions, P.")] = 16
    init_std: Annotated[float, Field(description="Spread of the initial keys and values.")] = 0.5
    prefix_projection: Annotated[bool, Field(description="Whether training reaches P through the MLP.")] = False
    encoder_hidden_size: Annotated[
        int | None, Field(description="Width of its hidden layer; null is PEFT's, the width of one layer's keys.")
    ] = None
    rows_size: Annotated[
        int | None,
        Field(description="Width d_r of the rows R that it reads; null is PEFT's, the width of one layer's keys."),
    ] = None
    separate: Annotated[bool, Field(description="Whether keys and values have an MLP each, on the same R.")] = False

    def __post_init__(self) -> None:
        for knob in ("encoder_hidden_size", "rows_size"):
            size = getattr(self, knob)
            if size is not None and size < 1:
                raise ValueError(f"{knob}: must be at least 1, given {size}")
        for knob in ("rows_size", "separate"):
            if getattr(self, knob) and not self.prefix_projection:
                raise ValueError(f"{knob}: is of the MLP, so prefix_projection must be true, given false")


class PrefixParams(NamedTuple):
    """All layers' keys and values in one tensor: row p is K₀ V₀ K₁ V₁ … of virtual position p."""

    embeddings: Float[Tensor, "P L 2 H D"]


def init(config: PrefixConfig, base: BaseShape, generator: torch.Generator | None = None) -> PrefixParams:
    """Draw normal noise with `init_std`; prefix tuning has no zero-delta start."""
    shape = (config.num_virtual_tokens, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    return PrefixParams(torch.randn(shape, generator=generator) * config.init_std)


def virtual(params: PrefixParams) -> VirtualKV:
    """Return keys and values, each [L, P, H, D], as views; differentiable."""
    keys, values = params.embeddings.permute(2, 1, 0, 3, 4).unbind(0)
    return VirtualKV(keys, values)


def count(config: PrefixConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count keys and values in every layer. The owner's 2ldL has d for H·D, which differ if heads share them."""
    shape = (2, config.num_virtual_tokens, base.num_layers, base.num_kv_heads, base.head_dim)
    return gather("2·P·L·H·D", [Term("·".join(map(str, shape)), math.prod(shape))])


def norms(params: PrefixParams) -> dict[str, float]:
    """Return the norms of every layer's keys and values; zero keys still draw attention, so 0 is not "no effect"."""
    found = {}
    for layer, (keys, values) in enumerate(zip(*virtual(params), strict=True)):
        found[f"‖P_K‖, layer {layer}"] = keys.float().norm().item()
        found[f"‖P_V‖, layer {layer}"] = values.float().norm().item()
    return found
