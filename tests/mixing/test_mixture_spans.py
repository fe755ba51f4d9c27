"""A mixture with only prefixes and prompts as experts: no deltas, and gates that only attention reads."""

from typing import Any

import torch

from tests import tiny
from tests.mixing import textbook_mixture as textbook
from tests.mixing.compositions import FLOAT32_TOLERANCE
from tests.serving import Row, Step, error, selected
from weft.kernels.selection import REFERENCE
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams
from weft.model.loader import Base

_TOKENS = list(range(30, 51))


def test_virtual_experts_alone_are_the_formula_and_leave_their_neighbours_alone(base: Base, stock: Any) -> None:
    experts = [tiny.random_prefix(base.shape, length=3 + 8 * seed, seed=seed) for seed in range(3)]
    experts.append(tiny.random_prompt(base.shape, length=6, seed=9))
    weight = torch.randn(base.shape.num_layers, 4, 64, generator=torch.Generator().manual_seed(1))
    mixture = Mixture(
        MixtureConfig(num_experts=4, top_k=2), MixtureParams(weight), tuple(Expert(f"{i:064x}") for i in range(4))
    )
    with torch.no_grad():
        wanted, gates = textbook.logits(stock, _TOKENS, mixture, experts)
        unrouted = textbook.logits(stock, _TOKENS, mixture, experts[::-1])[0]
    assert (gates == 0).any()
    assert (gates > 0).all(0).all(0).sum() == 0, "each expert is left out by some token"
    row = Row(_TOKENS, adapters=[(expert, 1.0) for expert in experts], mixture=mixture)
    lora = tiny.random_lora(base.shape, rank=3, seed=4)
    for kernels in (REFERENCE, selected(base)):
        step = Step(base, kernels)
        mine, plain, other = step.logits([row, Row(_TOKENS), Row(_TOKENS, experts[1])])
        assert error(mine, wanted) < FLOAT32_TOLERANCE
        assert error(mine, unrouted) > 100 * FLOAT32_TOLERANCE, "negative control"
        alone = step.logits([Row(_TOKENS), Row(_TOKENS), Row(_TOKENS, experts[1])])
        assert error(plain, alone[1]) < 1e-5
        assert error(other, alone[2]) < 1e-5
        beside = step.logits([row, Row(_TOKENS, lora), Row(_TOKENS, experts[1])])
        assert error(beside[0], wanted) < FLOAT32_TOLERANCE
    kept = step.logits([row, Row(_TOKENS), Row(_TOKENS, experts[1])])  # the kernels' bits, at a fixed shape
    moved = step.logits([Row(_TOKENS), Row(_TOKENS), Row(_TOKENS, experts[1])])
    assert kept[1].equal(moved[1])
    assert kept[2].equal(moved[2])
