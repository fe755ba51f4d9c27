"""P-tuning: prompt rows that an encoder makes (Liu et al. 2021, arXiv:2103.10385, section 3).

    E_input = [encoder(R); E_tokens],    R trained rows, encoder an MLP or a bidirectional LSTM with an MLP

The encoder belongs to training: only the rows that it made are saved and served, in prompt tuning's format.
Deviation: the paper may put rows between tokens; as in PEFT, all of them come first.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import torch
from pydantic import Field

from weft.methods.prompt.math import PromptParams
from weft.methods.protocol import BaseShape


class Encoder(StrEnum):
    """PEFT's two encoders."""

    MLP = "mlp"
    LSTM = "lstm"


@dataclass(frozen=True, slots=True, kw_only=True)
class PtuningConfig:
    """The number of rows, and the encoder that makes them."""

    num_virtual_tokens: Annotated[int, Field(description="Virtual positions, P.")] = 16
    encoder: Encoder = Encoder.MLP
    encoder_hidden_size: Annotated[
        int | None, Field(description="The encoder's inner width; null is PEFT's, the base's embedding size.")
    ] = None
    encoder_num_layers: Annotated[int, Field(description="Layers of the LSTM; the MLP always has three.")] = 2


def init(config: PtuningConfig, base: BaseShape, generator: torch.Generator | None = None) -> PromptParams:
    """Draw standard normal rows, as the encoder's input begins; in training the encoder's output replaces them."""
    return PromptParams(torch.randn(config.num_virtual_tokens, base.embedding_size, generator=generator))
