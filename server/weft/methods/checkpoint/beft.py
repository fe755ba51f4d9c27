"""BitFit in PEFT's form, which PEFT calls BEFT: `P.beft_bias` (1, out), what is added to the output of a linear module.

PEFT has no form for a norm's bias: it is stored as `P.weft_norm_bias` (out,), and `weft_norm_biases` is then true in
the config. PEFT loads such a file without the norms.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import bitfit, targets
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape, SiteKind

_BIAS, _NORM_BIAS = "beft_bias", "weft_norm_bias"
_HAS_NORMS = "weft_norm_biases"


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Check everything and give the adapter."""
    schema.check(config, schema.BEFT, limits)
    linear, norms = _by_module(tensors)
    has_norms = schema.boolean(config, _HAS_NORMS, "CONFIG_INVALID")
    if has_norms != bool(norms):
        raise InvalidAdapter.rule(
            "CONFIG_INVALID",
            f"adapter_config.{_HAS_NORMS}",
            f"must say whether the file holds a {_NORM_BIAS}",
            given=has_norms,
        )
    sites = scan.require_sites([*linear, *norms], base, *SiteKind, method="BitFit")
    params: dict[str, bitfit.BitfitParams] = {}
    for module, site in sites.items():
        is_norm = site.kind is SiteKind.NORM
        if module not in (norms if is_norm else linear):
            key, _ = (linear if is_norm else norms)[module]
            raise InvalidAdapter.rule(
                "TENSOR_UNKNOWN", key, f"must be called {_NORM_BIAS if is_norm else _BIAS} there", given=key
            )
        key, tensor = (norms if is_norm else linear)[module]
        scan.require_shape(key, tensor, (site.out_features,) if is_norm else (1, site.out_features))
        params[module] = bitfit.BitfitParams(tensor.reshape(-1), is_norm)
    scan.check_values(tensors, limits)
    if all(scan.is_zero(p.bias) for p in params.values()):
        raise scan.no_effect("BitFit")
    config_read = bitfit.BitfitConfig(target_modules=targets.describe(sites, base))
    return Adapter(method=bitfit.METHOD, config=config_read, sites=params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors, and ours for norms."""
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


def _by_module(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], dict[str, tuple[str, Tensor]]]:
    """(of linear modules, of norms): (key, tensor) by module."""
    linear: dict[str, tuple[str, Tensor]] = {}
    norms: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = scan.split_key(key, (_BIAS, _NORM_BIAS))
        if split is None:
            raise scan.refuse_unknown(key, "BitFit")
        module, ending = split
        found = linear if ending == _BIAS else norms
        if module in found:
            raise InvalidAdapter.rule(
                "PAIR_INCOMPLETE", key, "names a vector that another tensor names too", given=module
            )
        found[module] = (key, tensor)
    return linear, norms
