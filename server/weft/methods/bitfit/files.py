"""BitFit in PEFT's format, which PEFT calls BEFT: `P.beft_bias` (1, out) is added to the output of a linear module.

PEFT has no format for a norm's bias: it is stored as `P.weft_norm_bias` (out,), and `weft_norm_biases` is then true in
the config. PEFT loads such a file without the norms.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import targets
from weft.methods.bitfit.math import BitfitConfig, BitfitParams
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape, Fitted, SiteKind

_BIAS, _NORM_BIAS = "beft_bias", "weft_norm_bias"
_HAS_NORMS = "weft_norm_biases"
SCHEMA = schema.Schema(
    used=schema.words("target_modules weft_norm_biases"),
    inert=schema.words("exclude_modules layers_to_transform layers_pattern init_weights"),
    fixed={"modules_to_save": (None, [])},
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter."""
    by_module = scan.group(tensors, (_BIAS, _NORM_BIAS), "BitFit")
    has_norms = schema.boolean(config, _HAS_NORMS, "CONFIG_INVALID")
    if has_norms != any(_NORM_BIAS in found for found in by_module.values()):
        rule = f"must say whether the file holds a {_NORM_BIAS}"
        raise schema.refused("CONFIG_INVALID", _HAS_NORMS, rule, given=has_norms)
    sites = scan.require_sites(by_module, base, *SiteKind, method="BitFit")
    params: dict[str, BitfitParams] = {}
    for module, site in sites.items():
        is_norm = site.kind is SiteKind.NORM
        here = _NORM_BIAS if is_norm else _BIAS
        for ending, (key, tensor) in by_module[module].items():
            if ending != here:
                raise InvalidAdapter.rule("TENSOR_UNKNOWN", key, f"must be called {here} there", given=key)
            scan.require_shape(key, tensor, (site.out_features,) if is_norm else (1, site.out_features))
            params[module] = BitfitParams(tensor.reshape(-1), is_norm)
    scan.check_values(tensors, limits)
    if all(scan.is_zero(p.bias) for p in params.values()):
        raise scan.no_effect("BitFit")
    return Fitted(BitfitConfig(target_modules=targets.describe(sites, base)), params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors, and ours for norms."""
    tensors: dict[str, Tensor] = {}
    linear: list[str] = []
    for module, params in adapter.sites.items():
        if params.is_norm:
            tensors[scan.full_key(module, _NORM_BIAS)] = params.bias
        else:
            linear.append(module)
            tensors[scan.full_key(module, _BIAS)] = params.bias[None]
    has_norms = any(params.is_norm for params in adapter.sites.values())
    keys = {"target_modules": list(targets.describe(linear, base)), **({_HAS_NORMS: True} if has_norms else {})}
    return keys, tensors
