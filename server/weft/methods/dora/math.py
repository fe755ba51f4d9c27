"""DoRA: a low-rank update of a weight's direction, with a trained length for each of its rows.

Liu et al. 2024, arXiv:2402.09353, section 4.1, equation 5.

    y = m ⊙ (W₀ + s·B A) x / ‖W₀ + s·B A‖ + bias        ‖·‖: the length of each row of the weight, [O]

As in PEFT, the base's bias stays outside the rescaling, and the length in the divisor is a constant to the gradient
(section 4.3, equation 11). With c = m / ‖W₀ + s·B A‖ and the base output y, which holds the bias, the delta is

    (c·s·B) A x + (c - 1) ⊙ y - (c - 1) ⊙ bias

so a trained adapter folds into a LoRA, an output scale and a bias. The scale s is LoRA's, rsLoRA included. The paper
speaks of the columns of W₀; they are the rows of the [O, I] matrix here. Deviation: a row of zeros has no direction,
and c is 1 there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weft.methods.count import Count, Term, gather
from weft.methods.lora import math as lora
from weft.methods.lora.math import LoraConfig, LoraParams
from weft.methods.protocol import BaseShape, BaseWeight, DeltaKind, Drop, Packed, ReadBase, Site, keep
from weft.methods.shapes import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraConfig(LoraConfig):
    """LoRA's ranks, scales and targets."""

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        if self.lora_bias:
            raise ValueError("lora_bias: DoRA has none, given True")
        if self.invocation_tokens:
            raise ValueError(f"invocation_tokens: DoRA acts everywhere, given {self.invocation_tokens}")


class DoraParams(NamedTuple):
    """One site's update, and the access to the base weight that its divisor needs."""

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    magnitude: Float[Tensor, " O"]
    scaling: float
    read_base: ReadBase


class Folded(NamedTuple):
    """One site's update as it is served, with the base weight's lengths worked in."""

    product: LoraParams  # its scaling is 1
    scale: Float[Tensor, " O"]  # c
    shift: Float[Tensor, " O"] | None  # (1 - c) ⊙ bias, if the base has one


def init(config: DoraConfig, site: Site, generator: torch.Generator | None = None) -> DoraParams:
    """Return LoRA's start and the base's own lengths: the delta starts at zero, up to the rounding of c."""
    if site.read_base is None:
        raise ValueError(f"{site.name}: DoRA needs the base's weight, and this site only describes one")
    a, b, scaling, _ = lora.init(config, site, generator)
    lengths = site.read_base(lambda base: _lengths(base, a, b, scaling))
    return DoraParams(a, b, lengths, scaling, site.read_base)


def fold(params: DoraParams) -> Folded:
    """Fold the update into a LoRA, an output scale and a bias; differentiable in A, B and the magnitude."""
    a, b = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (params.a, params.b))

    def read(base: BaseWeight) -> tuple[Float[Tensor, " O"], Float[Tensor, " O"] | None]:
        bias = None if base.bias is None else base.bias.to(a)
        return _lengths(base, a, b, params.scaling), bias

    lengths, bias = params.read_base(read)
    # If a length is zero, dividing by one keeps the gradient finite.
    has_length = lengths > 0
    scale = params.magnitude.to(a.dtype) / torch.where(has_length, lengths, 1)
    scale = torch.where(has_length, scale, 1)  # [O]
    shift = None if bias is None else (1 - scale) * bias
    return Folded(LoraParams(a, b * (scale * params.scaling)[:, None], 1.0), scale, shift)


@torch.no_grad()
def _lengths(base: BaseWeight, a: Float[Tensor, "R I"], b: Float[Tensor, "O R"], scaling: float) -> Float[Tensor, " O"]:
    """Compute ‖W₀ + s·B A‖ by rows, block by block, on the base's device; the result is on A's device."""
    lengths = []
    begin = 0
    for weight in base.blocks(a.dtype):  # [N, I]
        rows = b[begin : begin + len(weight)].to(weight.device)
        lengths.append(torch.linalg.vector_norm(weight + scaling * (rows @ a.to(weight.device)), dim=1))
        begin += len(weight)
    return torch.cat(lengths).to(a.device)


def delta(
    params: DoraParams | Folded, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], drop: Drop = keep
) -> Float[Tensor, "*T O"]:
    """Compute the delta to the base output `y` for the input `x`; differentiable in `params`.

    drop: dropout of the update's input, in training. Deviation from PEFT, which then also recomputes the base's output
    from the remaining input: here `y` is whole.
    """
    folded = params if isinstance(params, Folded) else fold(params)
    exact_y = y.to(folded.scale.dtype)
    added = lora.delta(folded.product, x, exact_y, drop) + (folded.scale - 1) * exact_y
    if folded.shift is not None:
        added = added + folded.shift
    return added.to(y.dtype)


@torch.no_grad()
def pack(params: DoraParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Pack LoRA's two matrices; scale and bias are in float32 whatever the slots hold."""
    folded = fold(params)
    table_rows = (*lora.pack(folded.product, dtype), Packed(DeltaKind.SCALE_OUTPUT, 0, folded.scale.float(), None))
    if folded.shift is None:
        return table_rows
    return (*table_rows, Packed(DeltaKind.BIAS, 0, folded.shift.float(), None))


def unpack(packed: tuple[Packed, ...]) -> Folded:
    """Return views of a packed site."""
    product, scale, *shift = packed
    return Folded(lora.unpack((product,)), scale.first, shift[0].first if shift else None)


def is_identity(params: DoraParams) -> bool:
    """Return whether the lengths are the base's own, up to bfloat16's rounding, since PEFT may have used that."""
    return bool(((fold(params).scale - 1).abs() <= torch.finfo(torch.bfloat16).eps).all())


def count(config: DoraConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count LoRA's r(I + O), and a length for each of O rows, at every site."""
    lengths = (Term(str(site.out_features), site.out_features) for site in sites)
    return gather("Σ R(I + O) + Σ O", [*(lora.term(config, site) for site in sites), *lengths])
