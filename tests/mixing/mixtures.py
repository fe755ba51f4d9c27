"""Mixtures of adapters of every method, drawn at random."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import tiny
from tests.mixing import textbook_mixture as textbook
from tests.mixing.compositions import MAKERS
from tests.serving import Row
from weft.engine.request import ExpertBound
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import Adapter, BaseShape


class Mixed(NamedTuple):
    """A prompt, its mixture, and the experts."""

    tokens: list[int]
    mixture: Mixture
    experts: list[Adapter]
    bounds: tuple[ExpertBound, ...] = ()

    @property
    def row(self) -> Row:
        adapters = [(expert, 1.0) for expert in self.experts]
        return Row(self.tokens, adapters=adapters, mixture=self.mixture, bounds=self.bounds)

    def wanted(self, stock: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return textbook.logits(stock, self.tokens, self.mixture, self.experts, self.bounds)


def made(
    base: BaseShape,
    *,
    seed: int,
    num_experts: int,
    scale: float = 0.5,
    bounded: bool = False,
    methods: Sequence[str] = tuple(MAKERS),
    **config: Any,
) -> Mixed:
    """Return a random prompt, router and experts, one of each method first."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    read = MixtureConfig(num_experts=num_experts, **config)
    shape = (1 if read.shared else base.num_layers, read.num_choices, base.embedding_size)
    experts = [MAKERS[methods[(seed + i) % len(methods)]](base, dice, 100 * seed + i) for i in range(num_experts)]
    mixture = Mixture(
        read,
        MixtureParams(torch.randn(shape, generator=generator) * scale),
        tuple(Expert(f"{index:064x}") for index in range(num_experts)),
    )
    tokens = [dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 30))]
    bounds = ()
    if bounded:
        bounds = (ExpertBound(False), ExpertBound(True, 0.25), *[ExpertBound(True, 0.0, 0.375)] * (num_experts - 2))
    return Mixed(tokens, mixture, experts, bounds)


def mixtures(base: BaseShape, *, seed: int, all_kept: bool = False) -> list[Mixed]:
    """Return mixtures of five experts: every top_k, both levels, and every flag on and off.

    all_kept: every expert keeps a gate.
    """
    listed: list[Mixed] = []
    for index in range(12):
        null_expert = index % 2 == 1
        listed.append(
            made(
                base,
                seed=seed + index,
                num_experts=5,
                bounded=index % 4 == 3,
                top_k=5 + null_expert if all_kept else 1 + index % 5,
                shared=index % 3 == 0,
                null_expert=null_expert,
                normalize=index % 5 != 0,
                rms_norm=index % 4 == 1,
                absolute=index % 4 == 2,
                temperature=0.5 + index % 3,
                level=Level.SEQUENCE if index % 3 == 2 else Level.TOKEN,
            )
        )
    return listed
