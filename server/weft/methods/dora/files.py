"""DoRA in PEFT's format: a LoRA's file with use_dora and, at every site, `P.lora_magnitude_vector` (out,)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import scan
from weft.methods.dora.math import DoraConfig, DoraParams, is_identity
from weft.methods.lora import files as lora
from weft.methods.protocol import Adapter, BaseShape, Fitted, ReadBase, Site

SWITCH = "use_dora"
_MAGNITUDE = "lora_magnitude_vector"
SCHEMA = replace(
    lora.SCHEMA,
    fixed={**lora.SCHEMA.fixed, **lora.PLAIN_ONLY},
    advice={**lora.SCHEMA.advice, **dict.fromkeys(lora.PLAIN_ONLY, f"beside {SWITCH}")},
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter; tensors keep the dtype they were stored in."""
    settings, products, found = lora.read_products(config, tensors, base, limits, "DoRA", (_MAGNITUDE,))
    params: dict[str, DoraParams] = {}
    for module, (a, b, scaling, _) in products.items():
        site = base.sites[module]
        magnitude = lora.vector(found[module][_MAGNITUDE], site)
        params[module] = DoraParams(a, b, magnitude, scaling, _way_to_base(site))
    if all(map(lora.is_empty, products.values())) and all(map(is_identity, params.values())):
        raise scan.no_effect("DoRA")
    return Fitted(DoraConfig(**settings), params)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
    keys, tensors = lora.write(adapter, base)
    lengths = {scan.full_key(module, _MAGNITUDE): params.magnitude for module, params in adapter.sites.items()}
    return {**keys, SWITCH: True}, {**tensors, **lengths}


def _way_to_base(site: Site) -> ReadBase:
    """Return the access to the base's weight at a site; every loaded base has one."""
    if site.read_base is None:
        raise InvalidAdapter.rule(
            "FEATURE_UNSUPPORTED", "adapter_config.use_dora", "needs the base's weights, which are not here", given=True
        )
    return site.read_base
