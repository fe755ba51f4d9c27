"""Initialization of prompt rows from token embeddings: prompt tuning's best start (Lester et al. 2021, section 3.2)."""

import torch
from torch import Tensor

from weft.methods.prompt.math import PromptConfig, PromptInit, PromptParams
from weft.model.loader import Base


@torch.no_grad()
def begin(config: object, base: Base, generator: torch.Generator) -> PromptParams | None:
    """Return the embedding module's output for each token, scaled, float32 [P, E]; None for other configs.

    Raises ValueError for a text without tokens.
    """
    if not isinstance(config, PromptConfig) or config.prompt_init is PromptInit.RANDOM:
        return None
    ids = _token_ids(config, base, generator).to(base.device)
    return PromptParams(base.model.get_input_embeddings()(ids).float())


def _token_ids(config: PromptConfig, base: Base, generator: torch.Generator) -> Tensor:
    """Return token ids [P]: drawn from the whole vocabulary, or those of the text, repeated or cut."""
    length = config.num_virtual_tokens
    if config.prompt_init is PromptInit.VOCABULARY:
        return torch.randint(base.vocab_size, (length,), generator=generator)
    ids: list[int] = base.tokenizer(config.init_text, add_special_tokens=False)["input_ids"]  # pyright: ignore
    if not ids:
        raise ValueError(f"init_text: must give at least one token, given {config.init_text!r}")
    return torch.tensor((ids * -(-length // len(ids)))[:length])
