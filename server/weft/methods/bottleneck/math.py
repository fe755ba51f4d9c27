"""Bottleneck adapters: a small network after a sublayer (Houlsby et al. 2019, arXiv:1902.00751, section 2.1).

    f(z) = s · (W_up σ(W_down LN(z) + b_down) + b_up)        LN: the adapter's own, and may be left out

With h the sublayer's output and r the residual stream that entered the sublayer, the layer goes on with

    serial      h + f(h) + r        the owner's formula with the LN; AdapterHub's DoubleSeqBn without
    parallel    LN(h + f(h)) + r    the owner's "parallel (Pfeiffer)"; here f has no LN before it
    sum         h + f(h + r) + r    Pfeiffer et al. 2020, arXiv:2005.00247, as AdapterHub's SeqBn does it before norms
    residual    h + f(r) + r        "parallel" in He et al. 2021, arXiv:2110.04366; AdapterHub's ParBn

Deviations: Houlsby's section 2.1 has no LN inside f, the owner's formula has; the owner counts 2rd + 2r parameters,
here they are 2rd + r + d, and 2d more with the LN. `parallel` has no zero-delta start: it begins as LN(h).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from weft.errors import InvalidAdapter
from weft.methods import targets
from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, DeltaKind, Drop, Fitted, Packed, Site, keep, require_dropout
from weft.methods.shapes import Float


class Form(StrEnum):
    """The input of f, and the position of the LN."""

    SERIAL = "serial"
    PARALLEL = "parallel"
    SUM = "sum"
    RESIDUAL = "residual"

    @property
    def reads_residual(self) -> bool:
        return self in (Form.SUM, Form.RESIDUAL)


class Activation(StrEnum):
    """σ, by its name in torch.nn.functional. GELU is the exact one, with erf."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckConfig:
    """The adapters' places and widths."""

    form: Form = Form.SERIAL
    activation: Activation = Activation.RELU
    sublayers: Annotated[tuple[str, ...], Field(description="After attention, mlp or both.")] = ("attention", "mlp")
    reduction_factor: float = 16.0
    reduction_factors: Annotated[
        dict[int, float], Field(description="Layers that have a factor of their own, by index; then size is null.")
    ] = field(default_factory=dict)
    size: Annotated[
        int | None, Field(description="The bottleneck's width; null takes features / reduction_factor, at least 1.")
    ] = None
    layers: Annotated[tuple[int, ...], Field(description="Indices of the layers with adapters; empty for all.")] = ()
    leave_out: Annotated[tuple[int, ...], Field(description="Indices of layers without adapters.")] = ()
    scaling: float = 1.0
    dropout: Annotated[float, Field(description="Share of σ's outputs that a training step drops.")] = 0.0
    has_norm: Annotated[bool, Field(description="Whether the LN is there; the form parallel always has it.")] = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_dropout(self.dropout)
        if not self.sublayers or not set(self.sublayers) <= {"attention", "mlp"}:
            raise ValueError(
                f"sublayers: must name attention, mlp or both, given {', '.join(self.sublayers) or 'none'}"
            )
        if self.size is not None and (self.size < 1 or self.reduction_factors):
            raise ValueError(f"size: must be at least 1, and alone without reduction_factors, given {self.size}")
        for factor in (self.reduction_factor, *self.reduction_factors.values()):
            if not 0 < factor < math.inf:
                raise ValueError(f"reduction_factor: must be above 0, given {factor}")
        if self.form is Form.PARALLEL and not self.has_norm:
            raise ValueError("has_norm: the form parallel is the norm of a sum, given false")

    def size_at(self, site: Site) -> int:
        """Return the bottleneck's width at a site that ends a sublayer."""
        if self.size is not None:
            return self.size
        assert site.layer is not None
        return max(1, int(site.out_features // self.reduction_factors.get(site.layer, self.reduction_factor)))


class BottleneckParams(NamedTuple):
    """One site's network; H is the site's O."""

    down: Float[Tensor, "R H"]
    down_bias: Float[Tensor, " R"]
    up: Float[Tensor, "H R"]
    up_bias: Float[Tensor, " H"]
    norm: Float[Tensor, " H"] | None  # the LN's gain
    norm_bias: Float[Tensor, " H"] | None
    form: Form
    activation: Activation
    scaling: float
    norm_eps: float


def places(config: BottleneckConfig, sites: Iterable[Site]) -> list[Site]:
    """Return the sites that get an adapter: those that end the named sublayers, in the layers that are not left out."""
    return [site for site in sites if site.sublayer in config.sublayers and site.layer not in config.leave_out]


def init(config: BottleneckConfig, site: Site, generator: torch.Generator | None = None) -> BottleneckParams:
    """Draw W_down as torch.nn.Linear does; W_up and biases are 0, the LN's gain 1: f starts at exactly zero."""
    size, features = config.size_at(site), site.out_features
    bound = 1 / math.sqrt(features)
    return BottleneckParams(
        down=torch.empty(size, features).uniform_(-bound, bound, generator=generator),
        down_bias=torch.zeros(size),
        up=torch.zeros(features, size),
        up_bias=torch.zeros(features),
        norm=torch.ones(features) if config.has_norm else None,
        norm_bias=torch.zeros(features) if config.has_norm else None,
        form=config.form,
        activation=config.activation,
        scaling=config.scaling,
        norm_eps=config.norm_eps,
    )


def require_places(config: BottleneckConfig, base: BaseShape) -> None:
    """Raise InvalidAdapter if the base lacks a place that the config names, or a residual for a form that reads it."""
    ends = [site for site in base.sites.values() if site.sublayer]
    for sublayer in config.sublayers:
        if not any(site.sublayer == sublayer for site in ends):
            raise InvalidAdapter.rule(
                "FEATURE_UNSUPPORTED",
                "adapter_config.sublayers",
                f"must name sublayers whose output goes from a linear module to the residual stream as it is; "
                f"{base.name} has others",
                given=sublayer,
            )
    chosen = places(config, ends)
    for site in chosen:
        if config.form.reads_residual and not site.norm:
            raise InvalidAdapter.rule(
                "FEATURE_UNSUPPORTED",
                "adapter_config.form",
                f"needs sublayers that begin with a norm of the residual stream; that of {site.name} does not",
                limit=", ".join(form for form in Form if not form.reads_residual),
                given=config.form.value,
            )
    num_layers = 1 + max(site.layer for site in ends if site.layer is not None)
    for key, layers in (("leave_out", config.leave_out), ("reduction_factors", config.reduction_factors)):
        for layer in layers:
            if layer >= num_layers:
                raise InvalidAdapter.rule(
                    "CONFIG_INVALID", f"adapter_config.{key}", "names no layer", limit=num_layers - 1, given=layer
                )
    if not chosen:
        raise InvalidAdapter.rule(
            "CONFIG_INVALID", "adapter_config.leave_out", "leaves no layer", given=list(config.leave_out)
        )


def begin(config: BottleneckConfig, base: BaseShape, generator: torch.Generator) -> Fitted:
    """Return an untrained network at every place, with `layers` worked into `leave_out`."""
    targets.require_layers(config.layers, base)
    if config.layers:
        others = set(range(base.num_layers)).difference(config.layers)
        config = replace(config, layers=(), leave_out=tuple(sorted(others.union(config.leave_out))))
    require_places(config, base)
    sites = places(config, base.sites.values())
    for layer in config.reduction_factors:
        if all(site.layer != layer for site in sites):
            raise ValueError(f"reduction_factors: must name layers that have adapters, given {layer}")
    return Fitted(config, {site.name: init(config, site, generator) for site in sites})


def delta(
    params: BottleneckParams, h: Float[Tensor, "*T H"], r: Float[Tensor, "*T H"] | None, drop: Drop = keep
) -> Float[Tensor, "*T H"]:
    """Compute the delta to the sublayer's output `h`; `r` is the residual that entered it.

    Differentiable in `params`, `h` and `r`; `r` may be None if the form does not read it.
    drop: dropout of the narrow layer, in training.
    """
    wide = h.to(params.up_bias.dtype)  # slots keep vectors in float32, whatever the dtype of the matrices
    match params.form:
        case Form.SERIAL:
            added = _f(params, _norm(params, wide), drop)
        case Form.PARALLEL:
            added = _norm(params, wide + _f(params, wide, drop)) - wide
        case Form.SUM:
            assert r is not None
            added = _f(params, _norm(params, wide + r.to(wide.dtype)), drop)
        case Form.RESIDUAL:
            assert r is not None
            added = _f(params, _norm(params, r.to(wide.dtype)), drop)
    return added.to(h.dtype)


def _f(params: BottleneckParams, z: Float[Tensor, "*T H"], drop: Drop) -> Float[Tensor, "*T H"]:
    dtype = params.down.dtype
    activate: Callable[[Tensor], Tensor] = getattr(F, params.activation)
    hidden = activate(z.to(dtype) @ params.down.mT + params.down_bias)  # [*T, R]
    return (drop(hidden.to(dtype)) @ params.up.mT + params.up_bias) * params.scaling


def _norm(params: BottleneckParams, z: Float[Tensor, "*T H"]) -> Float[Tensor, "*T H"]:
    return z if params.norm is None else F.layer_norm(z, z.shape[-1:], params.norm, params.norm_bias, params.norm_eps)


_KINDS = {
    Form.SERIAL: DeltaKind.BOTTLENECK,
    Form.PARALLEL: DeltaKind.BOTTLENECK_NORMED,
    Form.SUM: DeltaKind.BOTTLENECK_SUM,
    Form.RESIDUAL: DeltaKind.BOTTLENECK_RESIDUAL,
}
_FORMS = {kind: form for form, kind in _KINDS.items()}
_ACTIVATIONS = tuple(Activation)  # a slot holds an index into it
_HEADER = 3  # activation, whether there is a norm, its eps


def pack(params: BottleneckParams, dtype: torch.dtype) -> tuple[Packed, ...]:
    """Stack W_down [R, H] on the scaled W_upᵀ [R, H]; the vectors follow a header of three numbers, in float32."""
    weights = torch.cat([params.down.float(), params.up.float().mT * params.scaling]).to(dtype)
    has_norm = params.norm is not None
    header = torch.tensor([_ACTIVATIONS.index(params.activation), has_norm, params.norm_eps], dtype=torch.float32)
    vectors = [header, params.down_bias.float(), params.up_bias.float() * params.scaling]
    if params.norm is not None and params.norm_bias is not None:
        vectors += [params.norm.float(), params.norm_bias.float()]
    return (Packed(_KINDS[params.form], len(params.down), weights.contiguous(), torch.cat(vectors)),)


def unpack(packed: tuple[Packed, ...]) -> BottleneckParams:
    """Return views of a packed site; its scaling is already part of W_up and b_up."""
    (network,) = packed
    assert network.second is not None
    rank, features = network.rank, network.first.shape[1]
    activation, has_norm, norm_eps = network.second[:_HEADER].tolist()
    sizes = [rank, features, *([features, features] if has_norm else [])]
    down_bias, up_bias, *norm = network.second[_HEADER:].split(sizes)
    return BottleneckParams(
        down=network.first[:rank],
        down_bias=down_bias,
        up=network.first[rank:].mT,
        up_bias=up_bias,
        norm=norm[0] if norm else None,
        norm_bias=norm[1] if norm else None,
        form=_FORMS[network.kind],
        activation=_ACTIVATIONS[int(activation)],
        scaling=1.0,
        norm_eps=norm_eps,
    )


def count(config: BottleneckConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count 2RH + R + H after every sublayer, and 2H more with the LN."""

    def term(site: Site) -> Term:
        rank, features = config.size_at(site), site.out_features
        num_vectors = 3 if config.has_norm else 1
        numbers = f"(2·{rank}·{features} + {rank} + {num_vectors}·{features})"
        return Term(numbers, 2 * rank * features + rank + num_vectors * features)

    return gather("Σ (2·R·H + R + H [+ 2·H])", map(term, sites))
