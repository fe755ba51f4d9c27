"""Fix rotary frequencies that a model would otherwise choose again in every forward pass.

Longrope (Ding et al. 2024, arXiv:2402.13753) has one set of factors for short sequences and one for long ones, and
dynamic NTK stretches its base with the length. transformers takes the largest position of the whole flattened step as
the length, so a long request would change the numbers of its neighbours. A server decides once instead, by the longest
request that it admits. This is what a model alone does at that length, and no row depends on another.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED = "default"  # transformers recomputes nothing for a module of this type


class _Rotary(NamedTuple):
    """One set of frequencies: of a module, or of one layer type in a module."""

    module: Any
    kind: str
    layer_type: str | None


class Factors(NamedTuple):
    """The chosen frequencies ("longrope: long factors"), and the reason; "" if none depend on the length."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, since {self.reason}" if self.name else ""


def fix(model: Any, max_model_len: int) -> Factors:
    """Choose the frequencies of transformers' `model` for requests of up to `max_model_len` tokens, in place."""
    chosen: dict[Factors, None] = {}
    for rotary in list(_dependent(model)):
        if rotary.kind == "longrope":
            chosen[_fix_longrope(rotary, max_model_len)] = None
        # dynamic NTK begins with the frequencies of the trained length, beyond which no request is admitted
        kinds = rotary.module.rope_type
        rotary.module.rope_type = {**kinds, rotary.layer_type: _FIXED} if isinstance(kinds, dict) else _FIXED
    names, reasons = zip(*chosen, strict=True) if chosen else ((), ())
    return Factors("; ".join(dict.fromkeys(names)), "; ".join(reasons))


def _dependent(model: Any) -> Iterator[_Rotary]:
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield _Rotary(module, kind, layer_type)


def _fix_longrope(rotary: _Rotary, max_model_len: int) -> Factors:
    module, layer_type = rotary.module, rotary.layer_type
    parameters = module.config.rope_parameters
    original = (parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"]
    is_long = max_model_len > original
    buffer: torch.Tensor = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, buffer.device, seq_len=original + is_long, layer_type=layer_type
    )
    buffer.copy_(frequencies)
    relation = ">" if is_long else "≤"
    return Factors(
        f"longrope: {'long' if is_long else 'short'} factors", f"max_model_len {max_model_len} {relation} {original}"
    )
