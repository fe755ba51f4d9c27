"""Prompt tuning: trained embedding rows before those of the tokens (Lester et al. 2021, arXiv:2104.08691, section 2).

    E_input = [E_prompt; E_tokens]

Tokens count from position P on. No row of the prompt sees a token, so its keys and values are the same for every
request: they are computed once and shared, as a prefix's are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from weft.methods.count import Count, Term, gather
from weft.methods.protocol import BaseShape, Site, SoftRows
from weft.methods.shapes import Float


class PromptInit(StrEnum):
    """The rows before training: noise, embeddings of tokens drawn by the seed, or those of a given text."""

    RANDOM = "random"
    VOCABULARY = "vocabulary"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """The number of rows, and their initial values."""

    num_virtual_tokens: Annotated[int, Field(description="Virtual positions, P.")] = 16
    prompt_init: PromptInit = PromptInit.VOCABULARY
    init_std: Annotated[float, Field(description="Spread of rows that begin as noise.")] = 0.5
    init_text: Annotated[
        str, Field(description="Its tokens, repeated or cut to P, are the first rows; given if prompt_init is text.")
    ] = ""

    def __post_init__(self) -> None:
        if (self.prompt_init is PromptInit.TEXT) != bool(self.init_text):
            raise ValueError(
                f"init_text: is given exactly where prompt_init is text, given {self.init_text!r} and "
                f"{self.prompt_init.value}"
            )


class PromptParams(NamedTuple):
    """The rows, in the form that the first layer reads."""

    embeddings: Float[Tensor, "P E"]


def init(config: PromptConfig, base: BaseShape, generator: torch.Generator | None = None) -> PromptParams:
    """Draw noise with `init_std`. The trainer, which has the base's embedding, puts in rows that begin as tokens."""
    return PromptParams(
        torch.randn(config.num_virtual_tokens, base.embedding_size, generator=generator) * config.init_std
    )


def virtual(params: PromptParams) -> SoftRows:
    """Return the rows themselves; differentiable."""
    return SoftRows(params.embeddings)


def count(config: PromptConfig, sites: Sequence[Site], base: BaseShape) -> Count:
    """Count P rows of the embedding's width E."""
    num_rows, width = config.num_virtual_tokens, base.embedding_size
    return gather("P·E", [Term(f"{num_rows}·{width}", num_rows * width)])
