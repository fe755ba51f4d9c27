"""AdaLoRA in PEFT's format: `P.lora_A` (r, in), `P.lora_B` (out, r), `P.lora_E` (r, 1).

    y = W₀x + alpha / (init_r + 1e-5) · B (A ⊙ E) x

(Zhang et al. 2023, arXiv:2303.10512, equation 3; the scale is PEFT's.) A finished one is a LoRA with E folded into A:
it is read and written as LoRA. Its training, which prunes rows, is not ours. The divisor is the rank that it began
with, even if rows have been pruned since.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import targets
from weft.methods.checkpoint import scan, schema
from weft.methods.lora import files
from weft.methods.lora import math as lora
from weft.methods.protocol import BaseShape, Fitted

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_PEFT_EPSILON = 1e-5
# Its `r` means nothing, and its rank_pattern lists the rows that were kept, which the tensors show themselves.
SCHEMA = schema.Schema(
    used=schema.words("lora_alpha init_r rank_pattern"),
    inert=files.SCHEMA.inert
    | schema.words("r alpha_pattern target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"),
    fixed={**files.SCHEMA.fixed, **files.PLAIN_ONLY, "use_dora": (None, False), "use_rslora": (None, False)},
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the LoRA that the adapter folds into."""
    init_rank = files.read_rank(config.get("init_r", 12), "init_r", limits)
    alpha = files.read_alpha(config.get("lora_alpha", 8), "lora_alpha") or float(init_rank)  # PEFT reads 0 as the rank
    scaling = alpha / (init_rank + _PEFT_EPSILON)
    files.require_scale(scaling, limits)
    by_module = scan.group(tensors, (_A, _B, _E), "AdaLoRA")
    sites = scan.require_sites(by_module, base, *lora.SITES, method="AdaLoRA")
    scan.check_values(tensors, limits)
    params: dict[str, lora.LoraParams] = {}
    for module, site in sites.items():
        found = by_module[module]
        files.require_complete(module, found, (_A, _B, _E))
        (a_key, a), (b_key, b), (e_key, e) = found[_A], found[_B], found[_E]
        rank = len(a) if config.get("rank_pattern") else init_rank
        if rank > init_rank:
            raise InvalidAdapter.rule(
                "RANK_MISMATCH", a_key, "has more rows than AdaLoRA began with", limit=init_rank, given=rank
            )
        files.require_product(site, a_key, a, b_key, b, rank)
        scan.require_shape(e_key, e, (rank, 1))
        if rank:  # a module may have lost all of its rows
            params[module] = lora.LoraParams(a.to(torch.float32) * e, b.to(torch.float32), scaling)
    if all(map(files.is_empty, params.values())):
        raise scan.no_effect("AdaLoRA")
    ranks = {module: p.rank for module, p in params.items() if p.rank != init_rank}
    return Fitted(
        lora.LoraConfig(
            rank=init_rank,
            alpha=scaling * init_rank,
            target_modules=targets.describe(params, base),
            rank_pattern=targets.patterns_of(ranks),
            alpha_pattern=targets.patterns_of({module: scaling * rank for module, rank in ranks.items()}),
        ),
        params,
    )
