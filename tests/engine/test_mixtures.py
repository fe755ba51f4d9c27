"""Requests of mixtures in the engine: leased as a whole, counted once per token, and removed without a trace."""

import math

import pytest
import torch

from tests.engine.fakes import UNIT_BYTES, FakeAdapter, FakeMixture, Harness
from weft.engine.request import ExpertBound, GateDetail, Gates, Request, SamplingParams
from weft.errors import DataLoss

EXPERTS = (FakeAdapter(7), FakeAdapter(3), FakeAdapter(5))
MIXTURE = FakeMixture(90, EXPERTS)
LONG = SamplingParams(temperature=0.0, max_new_tokens=12)


def gates_of(h: Harness, request: Request) -> Gates:
    finish = h.finish(request)
    assert finish is not None
    assert finish.gates is not None
    return finish.gates


def expected(first: int, last: int) -> list[list[list[float]]]:
    """Return the gates of the fake's router for the tokens first : last."""
    return [[[1000.0 * layer + 10 * t + e for e in range(3)] for layer in range(2)] for t in range(first, last)]


def of_experts(gates: list[list[list[float]]]) -> list[list[float]]:
    """Return the same, those of each expert together."""
    return [[layer[expert] for token in gates for layer in token] for expert in range(3)]


def test_a_request_of_a_mixture_answers_and_leaves_nothing() -> None:
    h = Harness()
    request = h.submit([1, 2, 3], mixture=MIXTURE)
    h.run()
    h.assert_answers(request)
    finish = h.finish(request)
    assert finish is not None
    assert finish.gates is None, "nobody asked"
    assert len(h.engine._computation.stepper.mixtures.of) == 0
    (batch, *_) = h.runner.steps
    assert batch.routing is not None
    # Experts are in the order of their digests, three for each of three rows.
    assert batch.routing.experts.tolist() == [0, 1, 2] * 3
    assert batch.routing.trace is None


def test_only_the_rows_of_mixtures_are_routed() -> None:
    h = Harness()
    h.submit([1, 2], FakeAdapter(7), FakeAdapter(5), gates=[0.5, 0.25])
    h.submit([3, 4], mixture=MIXTURE)
    h.submit([5])
    h.submit([6], FakeAdapter(3))
    h.run()
    h.assert_answers()
    routing = next(step.routing for step in h.runner.steps if len(step.paging.context_lens) == 4)
    assert routing is not None
    assert routing.experts.tolist() == [-1] * 4 + [0, 1, 2] * 2 + [-1]
    assert [(run.first, run.last) for run in routing.runs] == [(3, 5)], "whose adapters were not waited for came first"


@pytest.mark.parametrize("detail", list(GateDetail))
def test_each_computed_token_is_seen_once(detail: GateDetail) -> None:
    """In chunks, and with a preemption whose tokens are computed twice."""
    h = Harness(num_blocks=12, max_num_seqs=4, max_num_batched_tokens=5, caching=False)
    seen = h.submit(list(range(1, 10)), mixture=MIXTURE, params=LONG, gate_detail=detail)
    others = [h.submit(list(range(11, 20)), params=LONG) for _ in range(2)]
    late = h.submit(list(range(1, 10)), mixture=MIXTURE, params=LONG, gate_detail=detail)
    h.run()
    h.assert_answers(seen, *others, late)
    computed = sum(len(batch.input_ids) for batch in h.runner.steps)
    assert computed > 4 * (9 + 12 - 1), "negative control: nothing was computed twice"
    for request in (seen, late):
        if detail is GateDetail.NONE:
            finish = h.finish(request)
            assert finish is not None
            assert finish.gates is None
            continue
        wanted = expected(0, 9 + 12 - 1)
        assert gates_of(h, request).tokens == (of_experts(wanted) if detail is GateDetail.TOKENS else [])
        means = torch.tensor(wanted, dtype=torch.float64).mean(0)
        torch.testing.assert_close(torch.tensor(gates_of(h, request).mean, dtype=torch.float64), means)


def test_cached_tokens_have_no_gates() -> None:
    h = Harness()
    h.submit(list(range(1, 10)), mixture=MIXTURE)
    h.run()
    again = h.submit(list(range(1, 10)), mixture=MIXTURE, gate_detail=GateDetail.TOKENS)
    h.run()
    assert again.num_cached_tokens == 8
    assert gates_of(h, again).tokens == of_experts(expected(8, 9 + 4 - 1))


def test_blocks_are_shared_only_where_everything_that_makes_gates_is_the_same() -> None:
    prompt = list(range(1, 10))
    bounds = (ExpertBound(), ExpertBound(False), ExpertBound(True, 0.0, 0.5))
    asks = {
        "plain": {"mixture": MIXTURE},
        "bounded": {"mixture": MIXTURE, "wanted": bounds},
        "bounded otherwise": {"mixture": MIXTURE, "wanted": (*bounds[:2], ExpertBound(True, 0.0, math.inf))},
        "another router": {"mixture": FakeMixture(91, EXPERTS)},
        "of the prompt": {"mixture": MIXTURE, "reads_prompt": True},
    }
    h = Harness(num_blocks=128)
    for name, ask in asks.items():
        first = h.submit(prompt, **ask)
        h.run()
        again, longer = h.submit(prompt, **ask), h.submit([*prompt, 1], **ask)
        h.run()
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 8), name
        assert longer.num_cached_tokens == (0 if ask.get("reads_prompt") else 8), name
    composed = h.submit(prompt, *sorted(EXPERTS))
    h.run()
    assert composed.num_cached_tokens == 0, "the same experts at weight 1 are another thing"


def test_what_the_router_reads_and_the_wishes_are_made_once() -> None:
    h = Harness()
    bounds = (ExpertBound(), ExpertBound(False), ExpertBound(True, 0.25, 0.5))
    h.submit([2, 4], mixture=MIXTURE, wanted=bounds, reads_prompt=True)
    h.run()
    runs = [step.routing.runs[0] for step in h.runner.steps if step.routing]
    assert len(runs) == 4
    assert len({(run.pooled.data_ptr(), run.steering.data_ptr()) for run in runs}) == 1
    assert runs[0].pooled.tolist() == [3.0]
    assert runs[0].steering.tolist() == [[1, 0, 1], [0, 0, 0.25], [math.inf, math.inf, 0.5]]


def test_all_of_a_mixture_comes_or_nothing_of_it() -> None:
    """There is room for four units: the mixture and its experts need exactly that, and wait until all of it is free."""
    h = Harness(capacity_bytes=4 * UNIT_BYTES)
    holder = h.submit([1], FakeAdapter(40), params=LONG)
    h.turn()
    h.answer_load(FakeAdapter(40).digest)
    h.turn()
    mixed = h.submit([2], mixture=MIXTURE)
    h.turn()
    while h.loads:
        h.answer_load(h.loads[0])
    h.turn()
    assert h.engine.residency.resident() == {FakeAdapter(40).digest}
    assert h.finish(holder) is None
    h.run()
    h.assert_answers(holder, mixed)
    assert h.engine.residency.resident() == {MIXTURE.digest, *(expert.digest for expert in EXPERTS)}


@pytest.mark.parametrize("failing", [MIXTURE, *EXPERTS], ids=str)
def test_a_part_that_cannot_be_loaded_ends_the_request(failing: FakeAdapter | FakeMixture) -> None:
    h = Harness()
    request = h.submit([1], mixture=MIXTURE)
    h.turn()
    assert sorted(h.loads) == sorted([MIXTURE.digest, *(expert.digest for expert in EXPERTS)])
    h.answer_load(failing.digest, DataLoss("BLOB_CORRUPT", "gone"))
    h.turn()
    assert h.reason(request) == "BLOB_CORRUPT"
    assert len(h.engine._computation.stepper.mixtures.of) == 0


def test_taking_a_mixture_out_forgets_what_it_made() -> None:
    h = Harness()
    h.submit(list(range(1, 10)), mixture=MIXTURE)
    h.run()
    assert h.engine.blocks.num_cached_blocks == 3
    freed = h.engine.evict(MIXTURE.digest)
    h.turn()
    told = freed.result()
    assert told is not None
    assert (told.device_bytes, told.kv_blocks) == (UNIT_BYTES, 3)
    assert h.engine.blocks.num_cached_blocks == 0
