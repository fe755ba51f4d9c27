"""Prefix tuning in PEFT's form: one tensor `prompt_embeddings` (P, 2·L·H·D), already projected; a row is K₀ V₀ K₁ …"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods import prefix
from weft.methods.checkpoint import scan, schema
from weft.methods.protocol import Adapter, BaseShape

_EMBEDDINGS = "prompt_embeddings"


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Adapter:
    """Check everything and give the adapter."""
    schema.check(config, schema.PREFIX)
    length = schema.integer(config, "num_virtual_tokens", "PREFIX_INVALID", minimum=1)
    if length > limits.num_virtual_tokens_max:
        raise InvalidAdapter.rule(
            "PREFIX_INVALID",
            "adapter_config.num_virtual_tokens",
            "is too large",
            limit=limits.num_virtual_tokens_max,
            given=length,
        )
    for key in tensors:
        if key != _EMBEDDINGS:
            raise scan.refuse_unknown(key, "prefix")
    if _EMBEDDINGS not in tensors:
        raise scan.no_effect("prefix")
    embeddings = tensors[_EMBEDDINGS]
    width = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    if tuple(embeddings.shape) != (length, width):
        raise InvalidAdapter.rule(
            "PREFIX_INVALID",
            _EMBEDDINGS,
            "must be [num_virtual_tokens, 2 · layers · kv heads · head dim]",
            limit=[length, width],
            given=list(embeddings.shape),
        )
    scan.check_values(tensors, limits)
    shape = (length, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    read_config = prefix.PrefixConfig(num_virtual_tokens=length)
    return Adapter(
        method=prefix.METHOD, config=read_config, sites={}, prefix=prefix.PrefixParams(embeddings.reshape(shape))
    )


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors."""
    embeddings = adapter.prefix.embeddings
    length, num_layers, _, num_kv_heads, head_dim = embeddings.shape
    keys = {
        "num_virtual_tokens": length,
        "token_dim": num_kv_heads * head_dim,
        "num_attention_heads": num_kv_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": num_kv_heads * head_dim,
    }
    return keys, {_EMBEDDINGS: embeddings.reshape(length, -1)}
