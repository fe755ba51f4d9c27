"""Mixtures beside other rows: each gives the logits that it gives alone, bit for bit at a fixed batch shape."""

import random

import pytest

from tests import tiny
from tests.mixing.test_composition import error, mixes, selected
from tests.mixing.test_mixture import Mixed, made
from tests.serving import Row, Step
from weft.config import ModelConfig, Quantization
from weft.methods.mixture import Level, Mixture
from weft.model import loader, paged_attention

_BATCH = 32
_TOLERANCES = {  # of the same row in two batch shapes, relative as in tests/mixing/test_mixture.py
    (Quantization.NONE, "float32"): 1e-5,
    (Quantization.NF4, "bfloat16"): 0.03,
}


@pytest.fixture(scope="module", params=list(_TOLERANCES), ids=lambda key: f"{key[0].value}-{key[1]}")
def step_and_tolerance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, float]:
    quantization, dtype = request.param
    paged_attention.register()
    path = tiny.save_base(tmp_path_factory.mktemp("beside") / "base")
    config = ModelConfig(path=path, quantization=quantization, device="cpu", dtype=dtype)
    base = loader.load(config, attention=paged_attention.ATTENTION)
    return Step(base, selected(base), num_kv_blocks=512), _TOLERANCES[request.param]


def _mixed(step: Step, *, seed: int, top_k: int) -> list[Mixed]:
    levels = list(Level)
    return [
        made(step.base.shape, seed=seed + i, num_experts=2 + i % 5, top_k=min(top_k, 2 + i % 5), level=levels[i % 2])
        for i in range(_BATCH // 2)
    ]


def test_a_batch_of_32_answers_as_each_alone(step_and_tolerance: tuple[Step, float]) -> None:
    """Every second row is a mixture's; between them are compositions, single adapters and the base.

    All experts keep a gate: a choice that is nearly equal may fall differently where another batch shape rounds.
    """
    step, tolerance = step_and_tolerance
    batch: list[Row] = []
    for index, mixed in enumerate(_mixed(step, seed=100, top_k=99)):
        (mix,) = mixes(step.base.shape, seed=index, count=1)
        batch += [mixed.row, [Row(mix.tokens, adapters=mix.parts), Row(mix.tokens)][index % 2]]
    assert len(batch) == _BATCH
    together = step.logits(batch)
    for index, (row, mine) in enumerate(zip(batch, together, strict=True)):
        (alone,) = step.logits([row])
        assert error(mine, alone.double()) < tolerance, index
        if index % 8 == 0:
            (other,) = step.logits([row._replace(mixture=None)])
            assert error(mine, other.double()) > 3 * tolerance, "negative control: all experts at gate 1"


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_mixtures_leave_a_row_bit_equal(step_and_tolerance: tuple[Step, float], num_tokens: int) -> None:
    step, _ = step_and_tolerance
    dice = random.Random(num_tokens)
    mixtures = _mixed(step, seed=200, top_k=2)
    prompts = [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(16)]

    def row(tokens: list[int], mixed: Mixed | None) -> Row:
        return Row(tokens) if mixed is None else mixed._replace(tokens=tokens).row

    for mine in (mixtures[0], mixtures[1], mixtures[4], mixtures[7], None):
        wanted = None
        for trial in range(5):
            others = [mine if trial == 1 else dice.choice([*mixtures, None]) for _ in prompts[1:]]
            got = step.logits([row(tokens, one) for tokens, one in zip(prompts, [mine, *others], strict=True)])
            wanted = got[0] if wanted is None else wanted
            assert got[0].equal(wanted), f"trial {trial}: max {(got[0] - wanted).abs().max()}"
        # Negative control: the same comparison detects a change of the row's own router.
        moved = mixtures[8] if mine is None else mine._replace(mixture=_turned(mine))
        other = step.logits([row(prompts[0], moved), *(Row(tokens) for tokens in prompts[1:])])[0]
        assert not other.equal(wanted)


def _turned(mixed: Mixed) -> Mixture:
    params = mixed.mixture.params
    return mixed.mixture._replace(params=params._replace(weight=-params.weight))
