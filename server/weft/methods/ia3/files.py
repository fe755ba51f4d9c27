"""IA³ in PEFT's format: `P.ia3_l`, (out, 1) for scaled outputs, (1, in) for modules in `feedforward_modules`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.methods import targets
from weft.methods.checkpoint import scan, schema
from weft.methods.ia3.math import Ia3Config, Ia3Params
from weft.methods.protocol import Adapter, BaseShape, Fitted

_L = "ia3_l"
SCHEMA = schema.Schema(
    used=schema.words("target_modules feedforward_modules"),
    inert=schema.words("exclude_modules fan_in_fan_out init_ia3_weights"),
    fixed={"modules_to_save": (None, [])},
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter."""
    feedforward = _names(config, "feedforward_modules")
    named = _names(config, "target_modules")
    if named is not None and feedforward is not None and not feedforward <= named:
        raise schema.refused(
            "CONFIG_TARGETS",
            "feedforward_modules",
            "must be a subset of target_modules",
            given=", ".join(sorted(feedforward - named)),
        )
    by_module = scan.group(tensors, (_L,), "IA³")
    params: dict[str, Ia3Params] = {}
    for module, site in scan.require_sites(by_module, base).items():
        key, tensor = by_module[module][_L]
        if feedforward is None:  # a pattern, never compiled: the shape decides
            is_feedforward = tuple(tensor.shape) == (1, site.in_features)
        else:
            is_feedforward = targets.any_names(feedforward, module)
        scan.require_shape(key, tensor, (1, site.in_features) if is_feedforward else (site.out_features, 1))
        params[module] = Ia3Params(tensor.reshape(-1), is_feedforward)
    scan.check_values(tensors, limits)
    if all(scan.is_zero(p.scale - 1) for p in params.values()):
        raise scan.no_effect("IA³")
    names, inputs = _described(params, base)
    return Fitted(Ia3Config(target_modules=tuple(names), feedforward_modules=tuple(inputs)), params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
    names, inputs = _described(adapter.sites, base)
    keys = {"target_modules": names, "feedforward_modules": inputs}
    tensors = {
        scan.full_key(module, _L): params.scale.reshape((1, -1) if params.is_feedforward else (-1, 1))
        for module, params in adapter.sites.items()
    }
    return keys, tensors


def _described(params: Mapping[str, Ia3Params], base: BaseShape) -> tuple[list[str], list[str]]:
    """Return (target_modules, feedforward_modules), the second a subset of the first, as PEFT requires."""
    inputs = targets.describe([module for module, p in params.items() if p.is_feedforward], base)
    outputs = targets.describe([module for module, p in params.items() if not p.is_feedforward], base)
    return sorted({*inputs, *outputs}), list(inputs)


def _names(config: Mapping[str, Any], key: str) -> frozenset[str] | None:
    """Return the module names of a list; None for a pattern or if the key is absent."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise schema.refused("CONFIG_TARGETS", key, "must be a list of module names", given=value)
    return frozenset(value)
