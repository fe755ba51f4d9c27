"""Bottleneck adapters in our own format, since PEFT has none. adapters_store/README.md describes it.

    P.bottleneck_down.weight (R, H), P.bottleneck_down.bias (R), P.bottleneck_up.weight (H, R), P.bottleneck_up.bias
    (H), and with a LN P.bottleneck_norm.weight (H), P.bottleneck_norm.bias (H)

P is the linear module that ends the sublayer. A file of another version is refused.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.bottleneck import math as bottleneck
from weft.methods.bottleneck.math import Activation, BottleneckConfig, BottleneckParams, Form
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape, Fitted, Site

FORMAT = 1
_MATRICES = ("bottleneck_down.weight", "bottleneck_down.bias", "bottleneck_up.weight", "bottleneck_up.bias")
_NORMS = ("bottleneck_norm.weight", "bottleneck_norm.bias")
SCHEMA = schema.Schema(
    used=schema.words(
        "bottleneck_format form activation sublayers reduction_factor reduction_factors size leave_out scaling "
        "has_norm norm_eps"
    ),
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter; tensors keep the dtype they were stored in."""
    if type(config.get("bottleneck_format")) is not int or config["bottleneck_format"] != FORMAT:
        rule, given = "is not a version this server reads", config.get("bottleneck_format")
        raise schema.refused("FEATURE_UNSUPPORTED", "bottleneck_format", rule, limit=FORMAT, given=given)
    by_module = scan.group(tensors, (*_MATRICES, *_NORMS), "bottleneck")
    parts = {module: {end: tensor for end, (_, tensor) in found.items()} for module, found in by_module.items()}
    scan.require_sites(parts, base)
    return fitted(_config(config), parts, tensors, base, limits)


def fitted(
    config: BottleneckConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
    base: BaseShape,
    limits: AdapterLimits,
) -> Fitted:
    """Return the adapter of `parts`, tensors by site name and ending, checked against the base.

    tensors: all tensors of the file, by the names they have there.
    """
    bottleneck.require_places(config, base)
    places = {site.name: site for site in bottleneck.places(config, base.sites.values())}
    _require_tensors(parts, places, base)
    params: dict[str, BottleneckParams] = {}
    for module, site in places.items():
        params[module] = _params(config, site, parts[module], limits)
    scan.check_values(tensors, limits)
    if config.form is not Form.PARALLEL and all(_is_idle(p) for p in params.values()):
        raise scan.no_effect("bottleneck")
    return Fitted(config, params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return our config keys and tensors."""
    config: BottleneckConfig = adapter.config
    keys = {
        "bottleneck_format": FORMAT,
        "form": config.form.value,
        "activation": config.activation.value,
        "sublayers": list(config.sublayers),
        "reduction_factor": config.reduction_factor,
        "reduction_factors": {str(layer): factor for layer, factor in config.reduction_factors.items()},
        "size": config.size,
        "leave_out": list(config.leave_out),
        "scaling": config.scaling,
        "has_norm": config.has_norm,
        "norm_eps": config.norm_eps,
    }
    tensors = {}
    for module, params in adapter.sites.items():
        for ending, value in zip((*_MATRICES, *_NORMS), params, strict=False):  # the fields begin in this order
            if value is not None:
                tensors[scan.full_key(module, ending)] = value
    return keys, tensors


def _config(config: Mapping[str, Any]) -> BottleneckConfig:
    sublayers = config.get("sublayers", ["attention", "mlp"])
    named = isinstance(sublayers, list) and all(name in ("attention", "mlp") for name in sublayers)
    if not named or len(set(sublayers)) != len(sublayers) or not sublayers:
        raise schema.refused("CONFIG_TARGETS", "sublayers", "must be a list of attention, mlp or both", given=sublayers)
    form = Form(_member(config, "form", Form))
    has_norm = schema.boolean(config, "has_norm", "CONFIG_INVALID")
    if form is Form.PARALLEL and not has_norm:
        raise schema.refused("CONFIG_INVALID", "has_norm", "must be true for parallel", given=False)
    size = None if config.get("size") is None else schema.integer(config, "size", "RANK_INVALID", minimum=1)
    factors = reduction_factors(config.get("reduction_factors") or {}, "reduction_factors")
    if size is not None and factors:
        raise schema.refused("CONFIG_INVALID", "reduction_factors", "must be empty beside a size", given=factors)
    return BottleneckConfig(
        form=form,
        activation=Activation(_member(config, "activation", Activation)),
        sublayers=tuple(sublayers),
        reduction_factor=number(config.get("reduction_factor", 16), "reduction_factor", "RANK_INVALID", above=0),
        reduction_factors=factors,
        size=size,
        leave_out=leave_out(config),
        scaling=number(config.get("scaling", 1.0), "scaling", "SCALE_INVALID"),
        has_norm=has_norm,
        norm_eps=number(config.get("norm_eps", 1e-5), "norm_eps", "CONFIG_INVALID", above=0),
    )


def number(value: Any, key: str, reason: str, *, above: float = -math.inf) -> float:
    """Return a finite number above `above`."""
    if type(value) not in (int, float) or not above < value < math.inf:
        rule = "must be a finite number" if above == -math.inf else f"must be a finite number above {above:g}"
        raise schema.refused(reason, key, rule, given=value)
    return float(value)


def reduction_factors(value: Any, key: str) -> dict[int, float]:
    """Return an object of layer indices and their factors."""
    if not isinstance(value, dict) or not all(name.isascii() and name.isdecimal() for name in value):
        raise schema.refused("CONFIG_INVALID", key, "must be an object of layer numbers", given=value)
    return {int(name): number(factor, f"{key}[{name}]", "RANK_INVALID", above=0) for name, factor in value.items()}


def leave_out(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the indices of layers without adapters."""
    value = config.get("leave_out") or []
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        raise schema.refused("CONFIG_INVALID", "leave_out", "must be a list of layer numbers", given=value)
    return tuple(value)


def _member(config: Mapping[str, Any], key: str, members: Iterable[str]) -> str:
    value = config.get(key)
    if not isinstance(value, str) or value not in list(members):
        raise schema.refused("FEATURE_UNSUPPORTED", key, "is not served", limit=", ".join(members), given=value)
    return value


def _require_tensors(given: Collection[str], places: Mapping[str, Site], base: BaseShape) -> None:
    """Require tensors at every place that the config names, and at no other."""
    for module in given:
        if module not in places:
            rule = "has an adapter where the config places none (sublayers, leave_out)"
            given_place = base.sites[module].sublayer or "no sublayer ends here"
            raise InvalidAdapter.rule("CONFIG_TARGETS", module, rule, given=given_place)
    for module in places:
        if module not in given:
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", module, "needs an adapter, as the config says", given=None)


def _params(
    config: BottleneckConfig, site: Site, parts: Mapping[str, Tensor], limits: AdapterLimits
) -> BottleneckParams:
    wanted = (*_MATRICES, *_NORMS) if config.has_norm else _MATRICES
    if parts.keys() != set(wanted):
        raise InvalidAdapter.rule(
            "PAIR_INCOMPLETE", site.name, f"needs {', '.join(wanted)}, and nothing else", given=", ".join(parts)
        )
    size, features = config.size_at(site), site.out_features
    rule = "has too wide a bottleneck; the operator sets the limit with --adapter-bottleneck-size-max"
    schema.require_at_most(limits.bottleneck_size_max, size, "RANK_TOO_LARGE", site.name, rule)
    if abs(config.scaling) > limits.scaling_max:
        rule = "is too large; the operator sets the limit with --adapter-scaling-max"
        raise schema.refused("SCALE_INVALID", "scaling", rule, limit=limits.scaling_max, given=config.scaling)
    down = parts["bottleneck_down.weight"]
    if down.dim() == 2 and down.shape[1] == features and down.shape[0] != size:
        key, rule = scan.full_key(site.name, "bottleneck_down.weight"), "has another size than the config"
        raise InvalidAdapter.rule("RANK_MISMATCH", key, rule, limit=size, given=down.shape[0])
    shapes = ((size, features), (size,), (features, size), (features,), (features,), (features,))
    for ending, shape in zip(wanted, shapes, strict=False):
        scan.require_shape(scan.full_key(site.name, ending), parts[ending], shape)
    dtypes = {parts[ending].dtype for ending in wanted}
    if len(dtypes) > 1:
        raise InvalidAdapter.rule(
            "PAIR_INCOMPLETE", site.name, "must have one dtype", given=" and ".join(sorted(map(str, dtypes)))
        )
    values = (parts.get(ending) for ending in (*_MATRICES, *_NORMS))
    return BottleneckParams._make((*values, config.form, config.activation, config.scaling, config.norm_eps))


def _is_idle(params: BottleneckParams) -> bool:
    return params.scaling == 0 or (scan.is_zero(params.up) and scan.is_zero(params.up_bias))
