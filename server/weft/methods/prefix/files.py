"""Prefix tuning in PEFT's format: one tensor `prompt_embeddings` (P, 2·L·H·D), already projected.

A row is K₀ V₀ K₁ V₁ …

PEFT's CARTRIDGE saves the same tensor (Eyuboglu et al. 2025, arXiv:2506.06266); it is read, and written, as
prefix tuning.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.methods.checkpoint import virtual
from weft.methods.checkpoint.schema import Schema, words
from weft.methods.prefix.math import PrefixConfig, PrefixParams
from weft.methods.protocol import Adapter, BaseShape, Fitted

SCHEMA = Schema(
    used=words("num_virtual_tokens"),
    inert=virtual.INERT | words("encoder_hidden_size prefix_projection init_weights"),
    fixed=virtual.FIXED,
)
# Prefix tuning trained without an MLP; the number of frozen positions means nothing after training.
CARTRIDGE = Schema(
    used=words("num_virtual_tokens"), inert=virtual.INERT | words("num_frozen_tokens"), fixed=virtual.FIXED
)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits) -> Fitted:
    """Check the file, and return the adapter."""
    width = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    rows = virtual.read_rows(
        config, tensors, limits, method="prefix", width=width, width_is="2 · layers · kv heads · head dim"
    )
    shape = (len(rows), base.num_layers, 2, base.num_kv_heads, base.head_dim)
    return Fitted(PrefixConfig(num_virtual_tokens=len(rows)), prefix=PrefixParams(rows.reshape(shape)))


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
    embeddings = adapter.prefix.embeddings
    length, num_layers, _, num_kv_heads, head_dim = embeddings.shape
    keys = {
        "num_virtual_tokens": length,
        "token_dim": num_kv_heads * head_dim,
        "num_attention_heads": num_kv_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "prefix_projection": False,  # the tensor is the MLP's output; with true PEFT would look for the MLP
        "encoder_hidden_size": num_kv_heads * head_dim,
    }
    return keys, {virtual.EMBEDDINGS: embeddings.reshape(length, -1)}
