"""The tensor that every method with virtual positions has on disk: `prompt_embeddings`, one row per position."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import scan, schema
from weft.methods.shapes import Float

EMBEDDINGS = "prompt_embeddings"
INERT = schema.words("token_dim num_attention_heads num_layers")
FIXED: Mapping[str, tuple[Any, ...]] = {"num_transformer_submodules": (None, 1), "modules_to_save": (None, [])}


def read_rows(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    limits: AdapterLimits,
    *,
    method: str,
    width: int,
    width_is: str,
) -> Float[Tensor, "P width"]:
    """Return the checked tensor. method, width_is: names of the adapter and the width in errors."""
    length = schema.integer(config, "num_virtual_tokens", "PREFIX_INVALID", minimum=1)
    most, field = limits.num_virtual_tokens_max, "adapter_config.num_virtual_tokens"
    schema.require_at_most(most, length, "PREFIX_INVALID", field, "is too large")
    for key in tensors:
        if key != EMBEDDINGS:
            raise scan.refuse_unknown(key, method)
    if EMBEDDINGS not in tensors:
        raise scan.no_effect(method)
    rows = tensors[EMBEDDINGS]
    if tuple(rows.shape) != (length, width):
        rule = f"must be [num_virtual_tokens, {width_is}]"
        given = list(rows.shape)
        raise InvalidAdapter.rule("PREFIX_INVALID", EMBEDDINGS, rule, limit=[length, width], given=given)
    scan.check_values(tensors, limits)
    return rows
