"""Adapters that act on some tokens only: the formula with a gate for each token, and rows that are independent.

    out[t] = y[t] + Σ w · 1[t in ranges] · delta(x[t], y[t])

The oracle, the mixes of methods and the tolerances are those of compositions.py.
"""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.mixing.compositions import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, Mix, mixes
from tests.mixing.exact import exact_step
from tests.mixing.textbook_composition import Composition, Weighted
from tests.neighbours import assert_answers_as_alone, assert_same_bits
from tests.serving import Row, Step, error, selected
from weft.engine import token_ranges
from weft.engine.token_ranges import OPEN, Ranges, TokenRange
from weft.kernels.selection import REFERENCE
from weft.model.loader import Base


class Ranged(NamedTuple):
    """A prompt, a composition, and the ranges of each part."""

    mix: Mix
    ranges: list[Ranges]

    @property
    def row(self) -> Row:
        return Row(self.mix.tokens, adapters=self.mix.parts, ranges=self.ranges)

    @property
    def by_token(self) -> Weighted:
        """The composition with a weight for each token, for the oracle."""
        places = torch.arange(len(self.mix.tokens))
        return [
            (adapter, weight if not ranges else weight * _within(places, ranges))
            for (adapter, weight), ranges in zip(self.mix.parts, self.ranges, strict=True)
        ]


def _within(places: Tensor, ranges: Ranges) -> Tensor:
    return torch.stack([(places >= begin) & (places < end) for begin, end in ranges]).any(dim=0).double()[:, None]


def _some_ranges(dice: random.Random, num_tokens: int) -> Ranges:
    """Draw from one token to several ranges with gaps, half of the time up to the end."""
    edges = sorted(dice.sample(range(num_tokens + 1), min(num_tokens + 1, dice.choice([2, 2, 4, 6])) // 2 * 2))
    ranges = [TokenRange(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    if dice.random() < 0.5:
        ranges[-1] = TokenRange(ranges[-1].begin, OPEN)
    return token_ranges.normal(ranges)


def _ranged(base: Base, *, seed: int, count: int = 12) -> list[Ranged]:
    dice = random.Random(seed)
    made = []
    for mix in mixes(base.shape, seed=seed, count=count):
        ranges = [
            () if adapter.prefix is not None or dice.random() < 0.2 else _some_ranges(dice, len(mix.tokens))
            for adapter, _ in mix.parts
        ]
        made.append(Ranged(mix, ranges))
    return made


def test_the_ranges_are_what_they_should_be(base: Base) -> None:
    ranges = [one for ranged in _ranged(base, seed=5) for one in ranged.ranges]
    assert () in ranges
    assert {len(one) for one in ranges} >= {1, 2, 3}
    assert {one[-1].end == OPEN for one in ranges if one} == {True, False}


def test_logits_equal_the_formula_in_float64(base: Base, exact: Base, stock: Any) -> None:
    made, num_controls = _ranged(base, seed=5), 0
    listed = [one.row for one in made]
    for one, mine in zip(made, exact_step(exact, listed).logits(listed), strict=True):
        assert error(mine, textbook.logits(stock, one.mix.tokens, one.by_token)) < FLOAT64_TOLERANCE
        # Negative control: the result differs if one part acts everywhere.
        partial = [k for k, (_, w) in enumerate(one.by_token) if isinstance(w, Tensor) and (w == 0).any()]
        for k in partial[:1]:
            everywhere = one._replace(ranges=[() if i == k else ranges for i, ranges in enumerate(one.ranges)])
            wanted = textbook.logits(stock, one.mix.tokens, everywhere.by_token)
            assert error(mine, wanted) > 10 * FLOAT64_TOLERANCE
            num_controls += 1
    assert num_controls > 6


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: Base, stock: Any) -> None:
    made = _ranged(base, seed=6)
    got = Step(base, REFERENCE if kernels == "reference" else selected(base)).logits([one.row for one in made])
    for one, mine in zip(made, got, strict=True):
        assert error(mine, textbook.logits(stock, one.mix.tokens, one.by_token)) < FLOAT32_TOLERANCE


# -- neighbours -------------------------------------------------------------------------------------------------------


def test_ranged_rows_beside_plain_and_base_rows_answer_as_alone(step_and_tolerance: tuple[Step, float]) -> None:
    step, tolerance = step_and_tolerance
    rows = [one.row for one in _ranged(step.base, seed=7, count=24)]
    rows[::4] = [Row(row.tokens) for row in rows[::4]]
    rows[1::4] = [row._replace(ranges=()) for row in rows[1::4]]
    assert_answers_as_alone(step, tolerance, rows, {})


def test_the_tokens_before_a_range_are_the_base_s(step_and_tolerance: tuple[Step, float]) -> None:
    """Bit for bit in a batch of one shape, so their keys and values can be shared."""
    step, _ = step_and_tolerance
    tokens = list(range(10, 50))
    parts = [(tiny.random_lora(step.base.shape, rank=8, seed=1), 1.0)]
    for begin in (1, 17, 39):
        (mine,) = step.logits([Row(tokens, adapters=parts, ranges=[(TokenRange(begin, OPEN),)])])
        (base,) = step.logits([Row(tokens)])
        assert mine[:begin].equal(base[:begin])
        assert not mine[begin].equal(base[begin]), "negative control"


def test_neighbours_ranges_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float]) -> None:
    step, _ = step_and_tolerance
    dice = random.Random(8)
    prompts = [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(9)] for _ in range(12)]
    parts = [one.mix.parts for one in _ranged(step.base, seed=9, count=24)]

    def row(prompt: list[int], composed: Composition) -> Row:
        ranges = [() if a.prefix is not None else _some_ranges(dice, len(prompt)) for a, _ in composed]
        return Row(prompt, adapters=composed, ranges=ranges)

    for mine in (row(prompts[0], parts[0]), row(prompts[0], parts[3]), Row(prompts[0])):
        neighbourhoods = [[row(prompt, dice.choice(parts)) for prompt in prompts[1:]] for _ in range(4)]
        moved = mine._replace(adapters=parts[0][:1], ranges=[(TokenRange(8, 9),)])
        assert_same_bits(step, mine, neighbourhoods, moved)
