"""A replay of a captured step of mixtures gives the model's results: logits, and the gates that requests ask for.

Its rows have other mixtures than those of the capture, or none, with padding beside them.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.engine.decoding import Decoding
from tests.engine.test_captured import Forgetful
from tests.mixing.mixtures import made, mixtures
from tests.mixing.textbook_composition import Composition
from tests.serving import Row
from weft.engine.request import Gates
from weft.kernels.cpu import library
from weft.kernels.selection import select
from weft.methods.protocol import BaseShape
from weft.model import loader

pytestmark = pytest.mark.skipif(not library.available(), reason="no compiler for the kernels")

NUM_ROWS_MAX = 32


def _decodings(base: loader.Base) -> tuple[Decoding, Decoding]:
    kernels = select(base.device, base.dtype)
    return Decoding(base, kernels), Decoding(base, kernels, num_captured_rows=NUM_ROWS_MAX)


def _crowd(base: BaseShape, seed: int) -> list[Row | Composition]:
    """Twelve mixtures of every kind, and between them rows of the base, of an adapter, and of a composition."""
    loras = [tiny.random_lora(base, rank=2, seed=seed + place) for place in range(3)]
    plain: list[Row | Composition] = [[], [(loras[0], 1.0)], [(loras[1], 0.5), (loras[2], 0.25)]]
    blends = [one.row for one in mixtures(base, seed=seed)]
    return [*blends[:5], plain[0], *blends[5:8], *plain[1:], *blends[8:]]


def _assert_same(got: Sequence[Gates | None], wanted: Sequence[Gates | None]) -> None:
    assert [one is None for one in got] == [one is None for one in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(torch.tensor(mine.tokens), torch.tensor(theirs.tokens), rtol=1e-4, atol=1e-5)


def test_captured_steps_of_mixtures_give_the_logits_and_gates_of_plain_ones(base: loader.Base) -> None:
    plain, captured = _decodings(base)
    for decoding in (plain, captured):
        decoding.start(_crowd(base.shape, seed=1))
    everybody = list(range(len(plain.requests)))
    for kept in [everybody] * 20 + [everybody[:9], everybody[3:], [0], [11], [5], everybody]:
        torch.testing.assert_close(captured.step(kept), plain.step(kept), rtol=1e-4, atol=1e-5)
    graphs = captured.runner._captured
    assert graphs is not None
    assert any(shape.has_span_experts for shape in graphs.shapes)
    assert sum(shape.runs == 0 for shape in graphs.shapes) <= 1, "what has a mixture is captured as such"
    gates, wanted = captured.end(), plain.end()
    _assert_same(gates, wanted)
    assert sum(one is not None for one in gates) == 12


def test_other_mixtures_find_the_recording_of_the_first(base: loader.Base) -> None:
    """With as many experts and rows: routers, steering and their inputs are passed by address."""
    plain, captured = _decodings(base)
    sizes = []
    for seed in range(3):
        for decoding in (plain, captured):
            decoding.start(
                [
                    made(
                        base.shape, seed=10 * seed + row, num_experts=3, top_k=2, methods=("lora",), bounded=row == 1
                    ).row
                    for row in range(4)
                ]
            )
        for _ in range(3):
            torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
        _assert_same(captured.end(), plain.end())
        graphs = captured.runner._captured
        assert graphs is not None
        sizes.append(len(graphs.shapes))
    assert sizes == [1, 1, 1]


def test_a_replay_that_forgets_its_inputs_is_noticed(base: loader.Base) -> None:
    """Negative control."""
    kernels = select(base.device, base.dtype)
    plain = Decoding(base, kernels)
    forgetful = Decoding(base, replace(kernels, capture=Forgetful), num_captured_rows=NUM_ROWS_MAX)
    for decoding in (plain, forgetful):
        decoding.start(_crowd(base.shape, seed=2))
    torch.testing.assert_close(forgetful.step(), plain.step(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(forgetful.step(), plain.step(), rtol=1e-2, atol=1e-2)
    with pytest.raises(AssertionError, match="not close"):
        _assert_same(forgetful.end(), plain.end())
