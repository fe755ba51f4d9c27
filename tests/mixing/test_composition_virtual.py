"""Compositions with virtual positions: each part's form a span of their own, with log(weight) on their scores.

The oracle is that of tests/mixing/test_composition.py: the spans' keys and values as a cache, the logarithms in a mask.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.mixing.test_composition import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    MAKERS,
    NF4_TOLERANCE,
    VIRTUAL,
    Mix,
    error,
    exact_logits,
    nf4_and_stock,
    rows,
    selected,
    weight_of,
)
from tests.mixing.textbook_composition import Composition
from tests.serving import Row, Step
from weft.config import ModelConfig, Quantization
from weft.kernels.selection import REFERENCE
from weft.methods.protocol import BaseShape
from weft.model import loader, paged_attention

_WEIGHTS = (0.01, 0.3, 1.0, 1.0, 2.5, 4.0)  # of virtual positions
_QUANTIZED_TOLERANCES = {
    Quantization.NF4: 0.03,
    Quantization.INT8: 0.03,
}  # as in test_composition_isolation.py


@pytest.fixture(scope="module", params=list(_QUANTIZED_TOLERANCES), ids=lambda quantization: quantization.value)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, float]:
    paged_attention.register()
    path = tiny.save_base(tmp_path_factory.mktemp("quantized") / "base")
    config = ModelConfig(path=path, quantization=request.param, device="cpu")
    held = loader.load(config, attention=paged_attention.ATTENTION)
    return Step(held, selected(held), num_kv_blocks=1024), _QUANTIZED_TOLERANCES[request.param]


def _mixes(base: BaseShape, *, seed: int, count: int = 16) -> list[Mix]:
    """Compositions of 1 to 8 parts, of which 1 to 4 have virtual positions, among them soft prompts and prefixes."""
    dice = random.Random(seed)
    deltas = [name for name in MAKERS if name not in VIRTUAL]
    made = []
    for index in range(count):
        num_virtual = 1 + index % 4
        names = [VIRTUAL[(index + n) % 2] for n in range(num_virtual)]
        names += [dice.choice(deltas) for _ in range(dice.randrange(0, 9 - num_virtual))]
        dice.shuffle(names)
        parts = [
            (MAKERS[name](base, dice, dice.randrange(10**6)), _exact(dice) if name in VIRTUAL else weight_of(dice))
            for name in names
        ]
        made.append(Mix([dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 40))], parts))
    return made


def _exact(dice: random.Random) -> float:
    """A weight that float32 holds."""
    return torch.tensor(dice.choice(_WEIGHTS), dtype=torch.float32).item()


def _virtual(parts: Composition) -> list[int]:
    return [index for index, (adapter, _) in enumerate(parts) if adapter.prefix is not None]


def _moved(parts: Composition) -> Composition:
    """The same with the first virtual part's weight changed by a tenth."""
    index = _virtual(parts)[0]
    adapter, weight = parts[index]
    return [*parts[:index], (adapter, 1.1 * weight), *parts[index + 1 :]]


def test_the_mixes_are_what_they_should_be(base: loader.Base) -> None:
    made = _mixes(base.shape, seed=1, count=12)
    assert {len(_virtual(mix.parts)) for mix in made} == {1, 2, 3, 4}
    lengths = {mix.parts[i][0].num_virtual_tokens for mix in made for i in _virtual(mix.parts)}
    assert min(lengths) < 16 < max(lengths), "spans with a hole in their only block and in their second"
    assert {mix.parts[i][1] for mix in made for i in _virtual(mix.parts)} >= {1.0, 2.5, 4.0}
    names = {adapter.method.name for mix in made for adapter, _ in mix.parts}
    assert names >= {"lora", "dora", "bitfit", "ia3", "bottleneck", *VIRTUAL}


def test_logits_equal_the_formula_in_float64(path: Path, base: loader.Base, stock: Any) -> None:
    made = _mixes(base.shape, seed=1, count=12)
    for mix, mine in zip(made, exact_logits(path, rows(made)), strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT64_TOLERANCE
        moved = textbook.logits(stock, mix.tokens, _moved(mix.parts))
        assert error(mine, moved) > 10 * FLOAT64_TOLERANCE, "negative control"


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: loader.Base, stock: Any) -> None:
    made = _mixes(base.shape, seed=3, count=8)
    step = Step(base, REFERENCE if kernels == "reference" else selected(base), num_kv_blocks=512)
    for mix, mine in zip(made, step.logits(rows(made)), strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT32_TOLERANCE


def test_logits_equal_the_formula_on_nf4(tmp_path: Path) -> None:
    nf4, stock = nf4_and_stock(tiny.save_base(tmp_path))
    made = _mixes(nf4.shape, seed=4, count=8)
    got = Step(nf4, selected(nf4), num_kv_blocks=512).logits(rows(made))
    for mix, mine in zip(made, got, strict=True):
        wanted = textbook.logits(stock, mix.tokens, mix.parts)
        assert error(mine, wanted) < NF4_TOLERANCE
        without = [part for index, part in enumerate(mix.parts) if index not in _virtual(mix.parts)]
        assert error(mine, textbook.logits(stock, mix.tokens, without)) > 2 * NF4_TOLERANCE, "negative control"


def test_a_vanishing_weight_leaves_the_positions_alone(base: loader.Base) -> None:
    """The tokens have later positions, and nothing else changes: rotated positions are relative."""
    tokens = list(range(40, 60))
    prompt = tiny.random_prompt(base.shape, length=5, seed=1)
    deltas = [(tiny.random_lora(base.shape, rank=4, seed=2), 0.5)]
    absent, vanishing, small = Step(base, selected(base)).logits(
        [Row(tokens, adapters=[*deltas, *virtual]) for virtual in ([], [(prompt, 1e-30)], [(prompt, 0.1)])]
    )
    is_relative = base.shape.name != "gpt2"
    assert (error(vanishing, absent.double()) < FLOAT32_TOLERANCE) == is_relative
    assert error(small, absent.double()) > 100 * FLOAT32_TOLERANCE, "negative control"


def test_a_batch_of_32_answers_as_each_alone(quantized: tuple[Step, float]) -> None:
    step, tolerance = quantized
    made = _mixes(step.base.shape, seed=11, count=32)
    made[::5] = [mix._replace(parts=()) for mix in made[::5]]
    for index, (row, mine) in enumerate(zip(rows(made), step.logits(rows(made)), strict=True)):
        (alone,) = step.logits([row])
        assert error(mine, alone.double()) < tolerance, index
        (other,) = step.logits([Row(row.tokens, adapters=made[index - 1].parts)])
        assert error(mine, other.double()) > 3 * tolerance, index


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_compositions_leave_a_row_bit_equal(quantized: tuple[Step, float], num_tokens: int) -> None:
    """Also a row whose weights are all 1, whether or not a neighbour adds log-gates to the step."""
    step, _ = quantized
    dice = random.Random(num_tokens)
    parts = [mix.parts for mix in _mixes(step.base.shape, seed=12, count=24)]
    whole = [(adapter, 1.0) for adapter, _ in parts[2]]
    prompts = [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(8)]
    without_gates: list[Composition] = [[], whole, [(adapter, 1.0) for adapter, _ in parts[5]]]
    for mine in (whole, parts[0], parts[3]):
        neighbourhoods: list[Sequence[Composition]] = [
            [dice.choice(chosen) for _ in prompts[1:]] for chosen in (without_gates, parts, parts, [mine], [[]])
        ]
        answers = [
            step.logits([Row(prompt, adapters=p) for prompt, p in zip(prompts, [mine, *others], strict=True)])[0]
            for others in neighbourhoods
        ]
        for trial, answer in enumerate(answers[1:], 1):
            assert answer.equal(answers[0]), f"trial {trial}: max {(answer - answers[0]).abs().max()}"
        # Negative control: the same comparison detects a change of one of the row's own weights.
        mixed = [Row(prompts[0], adapters=_moved(mine)), *(Row(prompt) for prompt in prompts[1:])]
        assert not step.logits(mixed)[0].equal(answers[0])
