"""Base biases that PEFT trained beside a LoRA (`bias` is "lora_only" or "all"): `P.base_layer.bias` (out,).

PEFT stores the new bias; the base keeps its own here. The LoRA adds the difference, as the bias that B may have:

    scaling · (B A x + bias),    bias = (new - base's) / scaling
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from weft.errors import InvalidAdapter
from weft.methods.checkpoint import scan
from weft.methods.lora.math import LoraParams
from weft.methods.protocol import BaseShape, Site

_BIAS = "base_layer.bias"
_KEY = "adapter_config.bias"


Replaced = Mapping[str, tuple[str, Tensor]]  # the key and the new bias, by module


def split(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Replaced, Mapping[str, Tensor]]:
    """Return the replaced biases, and the other tensors. Refuses biases of modules that the LoRA leaves alone."""
    form = config.get("bias")
    if form in (None, "none"):
        return {}, tensors
    if form not in ("lora_only", "all"):
        raise InvalidAdapter.rule("FEATURE_UNSUPPORTED", _KEY, "must be none, lora_only or all", given=form)
    replaced: dict[str, tuple[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = scan.split_key(key, (_BIAS,))
        if found is not None:
            if found[0] in replaced:
                raise InvalidAdapter.rule(
                    "PAIR_INCOMPLETE", key, "names a bias that another tensor names too", given=found[0]
                )
            replaced[found[0]] = key, tensor
        elif key.endswith(".bias") and not key.endswith(".lora_B.bias"):
            rule = "is a bias outside of target_modules, which is not replaced: train it as BitFit (peft_type BEFT)"
            raise InvalidAdapter.rule("FEATURE_UNSUPPORTED", key, rule, given=key)
        else:
            rest[key] = tensor
    return replaced, rest


def add(replaced: Replaced, params: Mapping[str, LoraParams], base: BaseShape) -> dict[str, LoraParams]:
    """Return the updates with the changes of the biases; if one update has a bias, PEFT's format needs one on all."""
    for module, (key, _) in replaced.items():
        if module not in params:
            raise InvalidAdapter.rule("PAIR_INCOMPLETE", key, "needs lora_A and lora_B beside it", given=module)
    result = {}
    for module, held in params.items():
        site = base.sites[module]
        bias = torch.zeros(site.out_features) if held.bias is None else held.bias.float()
        if module in replaced:
            bias = bias + _change(site, *replaced[module], held.scaling)
        result[module] = held._replace(bias=bias)
    return result


def _change(site: Site, key: str, new: Tensor, scaling: float) -> Tensor:
    scan.require_shape(key, new, (site.out_features,))
    if scaling == 0:
        raise InvalidAdapter.rule("SCALE_INVALID", "adapter_config.lora_alpha", "must be above 0 beside bias", given=0)
    read_base = site.read_base
    bias = None if read_base is None else cast("Tensor | None", read_base(lambda base: base.bias))
    if bias is None:
        raise InvalidAdapter.rule("TENSOR_UNKNOWN", key, "replaces a bias that the base does not have", given=key)
    return (new.float() - bias.float().to(new.device)) / scaling
