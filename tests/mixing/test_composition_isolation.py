"""Composed rows beside plain ones: each gives the logits that it gives alone, bit for bit at a fixed batch shape."""

import random

import pytest

from tests import tiny
from tests.mixing.test_composition import Mix, error, mixes, rows, selected
from tests.serving import Row, Step
from weft.config import ModelConfig, Quantization
from weft.model import loader, paged_attention

_BATCH = 32
_TOLERANCES = {  # of the same row in two batch shapes, relative as in tests/mixing/test_composition.py
    (Quantization.NONE, "float32"): 1e-5,
    (Quantization.NF4, "bfloat16"): 0.03,
    (Quantization.INT8, "bfloat16"): 0.03,
}


@pytest.fixture(scope="module", params=list(_TOLERANCES), ids=lambda key: f"{key[0].value}-{key[1]}")
def step_and_tolerance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, float]:
    quantization, dtype = request.param
    paged_attention.register()
    path = tiny.save_base(tmp_path_factory.mktemp("beside") / "base")
    config = ModelConfig(path=path, quantization=quantization, device="cpu", dtype=dtype)
    base = loader.load(config, attention=paged_attention.ATTENTION)
    return Step(base, selected(base), num_kv_blocks=512), _TOLERANCES[request.param]


def _batch(step: Step, *, seed: int) -> list[Mix]:
    """Compositions of one to eight parts, and among them rows of one adapter and of the base."""
    made = mixes(step.base.shape, seed=seed, count=_BATCH)
    made[::5] = [mix._replace(parts=()) for mix in made[::5]]
    made[1::5] = [mix._replace(parts=[(mix.parts[0][0], 1.0)]) for mix in made[1::5]]
    return made


def test_a_batch_of_32_answers_as_each_alone(step_and_tolerance: tuple[Step, float]) -> None:
    step, tolerance = step_and_tolerance
    made = _batch(step, seed=11)
    assert {len(mix.parts) for mix in made} == set(range(9))
    together = step.logits(rows(made))
    for index, (row, mine) in enumerate(zip(rows(made), together, strict=True)):
        (alone,) = step.logits([row])
        assert error(mine, alone.double()) < tolerance, index
        # Negative control: the neighbour's composition on the same tokens gives another answer.
        (other,) = step.logits([Row(row.tokens, adapters=made[index - 1].parts)])
        assert error(mine, other.double()) > 3 * tolerance, index


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_compositions_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float], num_tokens: int) -> None:
    step, _ = step_and_tolerance
    dice = random.Random(num_tokens)
    made = _batch(step, seed=12)
    parts = [mix.parts for mix in made]
    prompts = [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(16)]
    for mine in (parts[0], parts[1], parts[7], parts[14], parts[23]):
        wanted = None
        for trial in range(5):
            neighbours = [mine if trial == 1 else dice.choice(parts) for _ in prompts[1:]]
            got = step.logits([Row(prompt, adapters=p) for prompt, p in zip(prompts, [mine, *neighbours], strict=True)])
            wanted = got[0] if wanted is None else wanted
            assert got[0].equal(wanted), f"trial {trial}: max {(got[0] - wanted).abs().max()}"
        # Negative control: the same comparison detects a change of one of the row's own weights.
        moved = [(adapter, gate + 0.125) for adapter, gate in mine if adapter.prefix is None] or parts[2]
        other = step.logits([Row(prompts[0], adapters=moved), *(Row(prompt) for prompt in prompts[1:])])[0]
        assert not other.equal(wanted)
