"""P-tuning in PEFT's format: its encoder's output, as prompt tuning's rows; the encoder's settings mean nothing now."""

from typing import Any

from torch import Tensor

from weft.methods.checkpoint import virtual
from weft.methods.checkpoint.schema import Schema, words
from weft.methods.prompt.files import sizes
from weft.methods.protocol import Adapter, BaseShape
from weft.methods.ptuning.math import PtuningConfig

SCHEMA = Schema(
    used=words("num_virtual_tokens"),
    inert=virtual.INERT
    | words("encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout"),
    fixed=virtual.FIXED,
)


def write(adapter: Adapter, base: BaseShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config keys and tensors."""
    config: PtuningConfig = adapter.config
    rows = adapter.prefix.embeddings
    keys = {
        **sizes(rows),
        "encoder_reparameterization_type": config.encoder.name,
        "encoder_hidden_size": config.encoder_hidden_size or rows.shape[1],
        "encoder_num_layers": config.encoder_num_layers,
        "encoder_dropout": 0.0,
    }
    return keys, {virtual.EMBEDDINGS: rows}
