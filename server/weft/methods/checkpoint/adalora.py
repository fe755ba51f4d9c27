"""AdaLoRA in PEFT's form: `P.lora_A` (r, in), `P.lora_B` (out, r), `P.lora_E` (r, 1).

    y = W₀x + alpha / (init_r + 1e-5) · B (A ⊙ E) x

(Zhang et al. 2023, arXiv:2303.10512, equation 3; the scale is PEFT's.) A finished one is a LoRA whose A holds E, and is
read as that; it is written as LoRA. Its training, which takes rows away, is not ours. The divisor is the rank it began
with, also where rows have been taken away since.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import lora, targets
from weft.methods.checkpoint import scan, schema
from weft.methods.checkpoint.lora import (
    group,
    is_empty,
    read_alpha,
    read_rank,
    require_complete,
    require_product,
    require_scale,
)
from weft.methods.protocol import Adapter, BaseShape, SiteKind

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_PEFT_EPSILON = 1e-5


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Check everything and give the LoRA that the adapter is."""
    schema.check(config, schema.ADALORA, limits)
    init_rank = read_rank(config.get("init_r", 12), "init_r", limits)
    alpha = read_alpha(config.get("lora_alpha", 8), "lora_alpha") or float(init_rank)  # PEFT's meaning of 0
    scaling = alpha / (init_rank + _PEFT_EPSILON)
    require_scale(scaling, limits)
    by_module = group(tensors, (_A, _B, _E), "AdaLoRA")
    sites = scan.require_sites(by_module, base, SiteKind.LINEAR, SiteKind.HEAD, method="AdaLoRA")
    scan.check_values(tensors, limits)
    params: dict[str, lora.LoraParams] = {}
    for module, site in sites.items():
        found = by_module[module]
        require_complete(module, found, (_A, _B, _E))
        (a_key, a), (b_key, b), (e_key, e) = found[_A], found[_B], found[_E]
        rank = len(a) if config.get("rank_pattern") else init_rank
        if rank > init_rank:
            raise InvalidAdapter.rule(
                "RANK_MISMATCH", a_key, "has more rows than AdaLoRA began with", limit=init_rank, given=rank
            )
        require_product(site, a_key, a, b_key, b, rank)
        scan.require_shape(e_key, e, (rank, 1))
        if rank:  # a module may have lost all of its rows
            params[module] = lora.LoraParams(a.to(torch.float32) * e, b.to(torch.float32), scaling)
    if all(map(is_empty, params.values())):
        raise scan.no_effect("AdaLoRA")
    ranks = {module: p.rank for module, p in params.items() if p.rank != init_rank}
    return Adapter(
        method=lora.METHOD,
        config=lora.LoraConfig(
            rank=init_rank,
            alpha=scaling * init_rank,
            target_modules=targets.describe(params, base),
            rank_pattern=targets.patterns_of(ranks),
            alpha_pattern=targets.patterns_of({module: scaling * rank for module, rank in ranks.items()}),
        ),
        sites=params,
    )
