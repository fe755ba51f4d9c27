"""Prompt tuning and P-tuning in PEFT's form: `prompt_embeddings` (P, E), of P-tuning what its encoder made."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.config import AdapterLimits
from weft.methods import prompt, ptuning
from weft.methods.checkpoint import schema, virtual
from weft.methods.protocol import Adapter, BaseShape


def read_prompt(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits
) -> Adapter:
    """Check everything and give the adapter."""
    schema.check(config, schema.PROMPT, limits)
    rows = _read_rows(config, tensors, base, limits, "prompt")
    read_config = prompt.PromptConfig(num_virtual_tokens=len(rows))
    return Adapter(method=prompt.METHOD, config=read_config, sites={}, prefix=prompt.PromptParams(rows))


def read_ptuning(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits
) -> Adapter:
    """The same for P-tuning; the encoder's settings mean nothing for what it made."""
    schema.check(config, schema.PTUNING, limits)
    rows = _read_rows(config, tensors, base, limits, "P-tuning")
    read_config = ptuning.PtuningConfig(num_virtual_tokens=len(rows))
    return Adapter(method=ptuning.METHOD, config=read_config, sites={}, prefix=prompt.PromptParams(rows))


def write_prompt(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors."""
    del base
    rows = adapter.prefix.embeddings
    return {**_sizes(rows), "prompt_tuning_init": "RANDOM"}, {virtual.EMBEDDINGS: rows}


def write_ptuning(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config keys and tensors."""
    del base
    config: ptuning.PtuningConfig = adapter.config
    rows = adapter.prefix.embeddings
    keys = {
        **_sizes(rows),
        "encoder_reparameterization_type": config.encoder.name,
        "encoder_hidden_size": config.encoder_hidden_size or rows.shape[1],
        "encoder_num_layers": config.encoder_num_layers,
        "encoder_dropout": 0.0,
    }
    return keys, {virtual.EMBEDDINGS: rows}


def _read_rows(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseShape, limits: AdapterLimits, method: str
) -> Tensor:
    return virtual.read_rows(
        config, tensors, limits, method=method, width=base.embedding_size, width_is="embedding size"
    )


def _sizes(rows: Tensor) -> dict[str, Any]:
    """Heads and layers are left out: PEFT takes them from the base, and rows do not depend on them."""
    length, embedding_size = rows.shape
    return {"num_virtual_tokens": length, "token_dim": embedding_size, "num_transformer_submodules": 1}
