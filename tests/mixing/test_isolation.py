"""Compositions and mixtures beside other rows: each gives the logits that it gives alone.

At a fixed batch shape, bit for bit.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pytest

from tests import tiny
from tests.mixing.compositions import Mix, mixes, moved, rows, virtual_mixes
from tests.mixing.mixtures import Mixed, made
from tests.mixing.textbook_composition import Composition
from tests.neighbours import assert_answers_as_alone, assert_same_bits
from tests.serving import Row, Step
from weft.methods.mixture import Level, Mixture
from weft.methods.protocol import BaseShape

_BATCH = 32


class _Batch(NamedTuple):
    """Rows, and others by index that must answer otherwise."""

    rows: Sequence[Row]
    others: Mapping[int, Row]


def _of(composed: list[Mix]) -> _Batch:
    """Return a batch of compositions; the neighbour's on the same tokens gives another answer."""
    others = {i: Row(mix.tokens, adapters=composed[i - 1].parts) for i, mix in enumerate(composed)}
    return _Batch(rows(composed), others)


def _composed(base: BaseShape, *, seed: int) -> list[Mix]:
    """Return compositions of one to eight parts, and among them rows of one adapter and of the base."""
    composed = mixes(base, seed=seed, count=_BATCH)
    composed[::5] = [mix._replace(parts=()) for mix in composed[::5]]
    composed[1::5] = [mix._replace(parts=[(mix.parts[0][0], 1.0)]) for mix in composed[1::5]]
    return composed


def _compositions(base: BaseShape) -> _Batch:
    composed = _composed(base, seed=11)
    assert {len(mix.parts) for mix in composed} == set(range(9))
    return _of(composed)


def _spans(base: BaseShape) -> _Batch:
    """Return compositions with virtual positions, and among them rows of the base."""
    composed = virtual_mixes(base, seed=11, count=_BATCH)
    composed[::5] = [mix._replace(parts=()) for mix in composed[::5]]
    return _of(composed)


def _mixed(base: BaseShape, *, seed: int, top_k: int) -> list[Mixed]:
    levels = list(Level)
    return [
        made(base, seed=seed + i, num_experts=2 + i % 5, top_k=min(top_k, 2 + i % 5), level=levels[i % 2])
        for i in range(_BATCH // 2)
    ]


def _mixtures(base: BaseShape) -> _Batch:
    """Return mixtures, and between them compositions, single adapters and the base; or all experts at gate 1.

    All experts keep a gate: a choice that is nearly equal may fall differently where another batch shape rounds.
    """
    batch: list[Row] = []
    for index, mixed in enumerate(_mixed(base, seed=100, top_k=99)):
        (mix,) = mixes(base, seed=index, count=1)
        batch += [mixed.row, [Row(mix.tokens, adapters=mix.parts), Row(mix.tokens)][index % 2]]
    return _Batch(batch, {index: batch[index]._replace(mixture=None) for index in range(0, _BATCH, 8)})


@pytest.mark.parametrize("draw", [_compositions, _spans, _mixtures])
def test_a_batch_of_32_answers_as_each_alone(
    step_and_tolerance: tuple[Step, float], draw: Callable[[BaseShape], _Batch]
) -> None:
    step, tolerance = step_and_tolerance
    batch = draw(step.base.shape)
    assert len(batch.rows) == _BATCH
    assert_answers_as_alone(step, tolerance, batch.rows, batch.others)


def _prompts(dice: random.Random, count: int, num_tokens: int) -> list[list[int]]:
    return [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]


def _beside(prompts: Sequence[list[int]], parts: Sequence[Composition]) -> list[Row]:
    return [Row(prompt, adapters=composition) for prompt, composition in zip(prompts, parts, strict=True)]


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_compositions_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float], num_tokens: int) -> None:
    step, _ = step_and_tolerance
    dice = random.Random(num_tokens)
    parts = [mix.parts for mix in _composed(step.base.shape, seed=12)]
    own, *prompts = _prompts(dice, 16, num_tokens)
    for mine in (parts[0], parts[1], parts[7], parts[14], parts[23]):
        neighbourhoods = [
            _beside(prompts, [mine if trial == 1 else dice.choice(parts) for _ in prompts]) for trial in range(5)
        ]
        changed = [(adapter, gate + 0.125) for adapter, gate in mine if adapter.prefix is None] or parts[2]
        assert_same_bits(step, Row(own, adapters=mine), neighbourhoods, Row(own, adapters=changed))


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_spans_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float], num_tokens: int) -> None:
    """Also a row whose weights are all 1, whether or not a neighbour adds log-gates to the step."""
    step, _ = step_and_tolerance
    dice = random.Random(num_tokens)
    parts = [mix.parts for mix in virtual_mixes(step.base.shape, seed=12, count=24)]
    whole = [(adapter, 1.0) for adapter, _ in parts[2]]
    own, *prompts = _prompts(dice, 8, num_tokens)
    without_gates: list[Composition] = [[], whole, [(adapter, 1.0) for adapter, _ in parts[5]]]
    for mine in (whole, parts[0], parts[3]):
        neighbourhoods = [
            _beside(prompts, [dice.choice(chosen) for _ in prompts])
            for chosen in (without_gates, parts, parts, [mine], [[]])
        ]
        assert_same_bits(step, Row(own, adapters=mine), neighbourhoods, Row(own, adapters=moved(mine)))


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_mixtures_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float], num_tokens: int) -> None:
    step, _ = step_and_tolerance
    dice = random.Random(num_tokens)
    mixtures = _mixed(step.base.shape, seed=200, top_k=2)
    own, *prompts = _prompts(dice, 16, num_tokens)

    def row(tokens: list[int], mixed: Mixed | None) -> Row:
        return Row(tokens) if mixed is None else mixed._replace(tokens=tokens).row

    for mine in (mixtures[0], mixtures[1], mixtures[4], mixtures[7], None):
        neighbourhoods = [
            [row(tokens, mine if trial == 1 else dice.choice([*mixtures, None])) for tokens in prompts]
            for trial in range(5)
        ]
        turned = mixtures[8] if mine is None else mine._replace(mixture=_turned(mine))
        assert_same_bits(step, row(own, mine), neighbourhoods, row(own, turned))


def _turned(mixed: Mixed) -> Mixture:
    params = mixed.mixture.params
    return mixed.mixture._replace(params=params._replace(weight=-params.weight))
