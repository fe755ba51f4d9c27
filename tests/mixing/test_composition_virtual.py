"""Compositions with virtual positions: each part's form a span of their own, with log(weight) on their scores.

The oracle is that of test_composition.py: the spans' keys and values as a cache, the logarithms in a mask.
"""

from typing import Any

import pytest

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.mixing.compositions import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    NF4_TOLERANCE,
    VIRTUAL,
    moved,
    rows,
    virtual_mixes,
    virtual_parts,
)
from tests.mixing.exact import exact_step
from tests.serving import Row, Step, error, selected
from weft.kernels.selection import REFERENCE
from weft.model.loader import Base


def test_the_mixes_are_what_they_should_be(base: Base) -> None:
    made = virtual_mixes(base.shape, seed=1, count=12)
    assert {len(virtual_parts(mix.parts)) for mix in made} == {1, 2, 3, 4}
    lengths = {mix.parts[i][0].num_virtual_tokens for mix in made for i in virtual_parts(mix.parts)}
    assert min(lengths) < 16 < max(lengths), "spans with a hole in their only block and in their second"
    assert {mix.parts[i][1] for mix in made for i in virtual_parts(mix.parts)} >= {1.0, 2.5, 4.0}
    names = {adapter.method.name for mix in made for adapter, _ in mix.parts}
    assert names >= {"lora", "dora", "bitfit", "ia3", "bottleneck", *VIRTUAL}


def test_logits_equal_the_formula_in_float64(base: Base, exact: Base, stock: Any) -> None:
    made = virtual_mixes(base.shape, seed=1, count=12)
    for mix, mine in zip(made, exact_step(exact, rows(made)).logits(rows(made)), strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT64_TOLERANCE
        other = textbook.logits(stock, mix.tokens, moved(mix.parts))
        assert error(mine, other) > 10 * FLOAT64_TOLERANCE, "negative control"


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: Base, stock: Any) -> None:
    made = virtual_mixes(base.shape, seed=3, count=8)
    step = Step(base, REFERENCE if kernels == "reference" else selected(base), num_kv_blocks=512)
    for mix, mine in zip(made, step.logits(rows(made)), strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT32_TOLERANCE


def test_logits_equal_the_formula_on_nf4(nf4_and_stock: tuple[Base, Any]) -> None:
    nf4, stock = nf4_and_stock
    made = virtual_mixes(nf4.shape, seed=4, count=8)
    got = Step(nf4, selected(nf4), num_kv_blocks=512).logits(rows(made))
    for mix, mine in zip(made, got, strict=True):
        wanted = textbook.logits(stock, mix.tokens, mix.parts)
        assert error(mine, wanted) < NF4_TOLERANCE
        without = [part for index, part in enumerate(mix.parts) if index not in virtual_parts(mix.parts)]
        assert error(mine, textbook.logits(stock, mix.tokens, without)) > 2 * NF4_TOLERANCE, "negative control"


def test_a_vanishing_weight_leaves_the_positions_alone(base: Base) -> None:
    """The tokens have later positions, and nothing else changes: rotated positions are relative."""
    tokens = list(range(40, 60))
    prompt = tiny.random_prompt(base.shape, length=5, seed=1)
    deltas = [(tiny.random_lora(base.shape, rank=4, seed=2), 0.5)]
    absent, vanishing, small = Step(base, selected(base)).logits(
        [Row(tokens, adapters=[*deltas, *virtual]) for virtual in ([], [(prompt, 1e-30)], [(prompt, 0.1)])]
    )
    is_relative = base.shape.name != "gpt2"
    assert (error(vanishing, absent) < FLOAT32_TOLERANCE) == is_relative
    assert error(small, absent) > 100 * FLOAT32_TOLERANCE, "negative control"
