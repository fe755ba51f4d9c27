"""Prompt tuning in PEFT's format: `prompt_embeddings` (P, E)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.methods.checkpoint import virtual
from weft.methods.checkpoint.schema import Schema, words
from weft.methods.prompt.math import PromptConfig, PromptParams
from weft.methods.protocol import Adapter, BaseShape, Fitted

SCHEMA = Schema(
    used=words("num_virtual_tokens"),
    inert=virtual.INERT | words("prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"),
    fixed=virtual.FIXED,
)


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseShape,
    limits: AdapterLimits,
    config_of: Callable[..., Any] = PromptConfig,
    method: str = "prompt",
) -> Fitted:
    """Check the file, and return the adapter. config_of: the config's type. method: the adapter's name in errors."""
    width = base.embedding_size
    rows = virtual.read_rows(config, tensors, limits, method=method, width=width, width_is="embedding size")
    return Fitted(config_of(num_virtual_tokens=len(rows)), prefix=PromptParams(rows))


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
    rows = adapter.prefix.embeddings
    return {**sizes(rows), "prompt_tuning_init": "RANDOM"}, {virtual.EMBEDDINGS: rows}


def sizes(rows: Tensor) -> dict[str, Any]:
    """Return PEFT's keys of rows, without heads and layers: PEFT takes these from the base, and rows need neither."""
    length, embedding_size = rows.shape
    return {"num_virtual_tokens": length, "token_dim": embedding_size, "num_transformer_submodules": 1}
