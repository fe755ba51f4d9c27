"""Steps that raise: the requests that raise alone end, their neighbours do not; a lost device ends the engine."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.engine.fakes import VOCAB_SIZE, FakeAdapter, FakeMixture, Harness
from weft.engine import sampler
from weft.engine.computation import FAILURES_MAX
from weft.engine.endings import ENGINE_DOWN
from weft.engine.request import FinishReason, GateDetail, Request, SamplingParams
from weft.errors import Code
from weft.kernels.step import Step
from weft.metrics import Metrics

METRICS = Metrics()
ONE, TWO, BIG = FakeAdapter(1), FakeAdapter(2), FakeAdapter(3, units=2)
POISON = VOCAB_SIZE - 1  # a prompt token that only the culprits have
LONG = SamplingParams(temperature=0.0, max_new_tokens=24)
DRAWN = SamplingParams(seed=7, max_new_tokens=24, logprobs=2)
KERNEL = RuntimeError("a kernel failed")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def harness(**config: Any) -> Harness:
    return Harness(metrics=METRICS, num_blocks=400, **{"max_num_seqs": 16, "max_num_batched_tokens": 64, **config})


def raising_on(requests: Iterable[Request], error: Exception = KERNEL) -> Callable[[Step], None]:
    """Return a fault of every step that has a row of one of these requests: of their last blocks, which are theirs."""
    culprits = list(requests)

    def fail(step: Step) -> None:
        last = {table[length - 1] for table, length in _tables(step)}
        if any(request.blocks and request.blocks[-1] in last for request in culprits):
            _raise(error)

    return fail


def _tables(step: Step) -> Iterator[tuple[list[int], int]]:
    for table, length in zip(step.paging.block_tables.tolist(), step.paging.context_lens.tolist(), strict=True):
        yield table, -(-length // 4)


def neighbours(h: Harness, count: int, params: Sequence[SamplingParams] = (LONG, DRAWN)) -> list[Request]:
    return [
        h.submit([index, 3, 5], *([ONE] if index % 2 else []), params=params[index // 2 % len(params)])
        for index in range(count)
    ]


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_culprit_ends_alone_and_its_neighbours_are_bit_equal(place: str) -> None:
    """T22 (a): 15 of 15 neighbours end normally, three rounds."""
    h = harness()
    for _ in range(3):
        others = neighbours(h, 15) if place == "last" else []
        h.turn(3)
        while h.loads:
            h.answer_load(h.loads[0])
        culprit = h.submit([9, 9, 9], TWO, params=LONG)
        others = others or neighbours(h, 15)
        h.runner.fail = raising_on([culprit])
        h.run()
        assert h.reason(culprit) == "STEP_FAILED"
        finish = h.finish(culprit)
        assert finish is not None
        assert finish.error is not None
        assert finish.error.code is Code.INTERNAL
        assert [h.reason(request) for request in others] == ["length"] * 15
    assert not h.num_down
    assert h.engine.blocks.num_used_blocks == 0
    h.assert_answers()


@pytest.mark.parametrize("num_culprits", [1, 2, 5])
def test_the_cost_of_a_culprit_is_bounded(num_culprits: int) -> None:
    h = harness()
    others = neighbours(h, 16 - num_culprits)
    culprits = [h.submit([9, index, 9], params=LONG) for index in range(num_culprits)]
    h.runner.fail = raising_on(culprits)
    while h.loads or not h.runner.steps:
        h.turn()
        while h.loads:
            h.answer_load(h.loads[0])
    before = len(h.runner.steps)
    while not all(map(h.finish, culprits)):
        h.turn()
    assert len(h.runner.steps) - before <= 1 + num_culprits * 2 * math.ceil(math.log2(16))
    assert not any(map(h.finish, others))
    h.run()
    h.assert_answers()


@pytest.fixture
def fail_sampling_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Yield a function that makes sampling for that many requests fail once, after all else of the step was done."""
    real, sizes = sampler.sample, set[int]()

    def sample(*given: Any) -> Any:
        made = real(*given)
        if len(given[1]) in sizes:
            sizes.clear()
            _raise(KERNEL)
        return made

    monkeypatch.setattr(sampler, "sample", sample)
    yield sizes.add
    assert not sizes, "it never failed"


def test_random_numbers_are_not_lost_when_sampling_raises(fail_sampling_once: Callable[[int], None]) -> None:
    """The first try draws the numbers, and then fails."""
    h = harness()
    for index in range(4):
        h.submit([index], params=SamplingParams(seed=index, max_new_tokens=12))
    h.turn(5)
    fail_sampling_once(4)
    h.run()
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    h.assert_answers()


def test_gates_of_a_step_that_is_computed_again_are_reported_once(fail_sampling_once: Callable[[int], None]) -> None:
    def gates(fail: bool) -> Any:
        h = harness()
        mixture = FakeMixture(7, (ONE, TWO))
        mixed = h.submit([1, 2, 3, 4, 5], mixture=mixture, params=LONG, gate_detail=GateDetail.TOKENS)
        while not h.tokens(mixed):
            h.turn()
            while h.loads:
                h.answer_load(h.loads[0])
        h.submit([9, 9], params=LONG)
        if fail:
            fail_sampling_once(2)
        h.run()
        finish = h.finish(mixed)
        assert finish is not None
        return finish.gates

    assert gates(fail=True) == gates(fail=False) is not None


# -- memory ----------------------------------------------------------------------------------------------------------


def short_of(*, rows: int) -> Callable[[Step], None]:
    """Return a fault of every step with more rows than this."""

    def fail(step: Step) -> None:
        if step.num_rows > rows:
            _raise(MEMORY)

    return fail


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_that_does_not_fit_the_memory_becomes_smaller_ones(rows: int) -> None:
    h = harness()
    neighbours(h, 9)
    h.submit([*range(30)], TWO, params=LONG)
    h.runner.fail = short_of(rows=rows)
    h.run()
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    h.assert_answers()


def test_idle_adapters_leave_before_anyone_ends() -> None:
    h = harness()
    h.submit([1], ONE)
    h.run()
    assert h.engine.residency.resident() == {ONE.digest}
    freed: list[int] = []
    h.runner.freed = lambda: freed.append(len(h.engine.residency.resident()))
    h.runner.fail = lambda step: None if freed else _raise(MEMORY)
    request = h.submit([2], params=LONG)
    h.run()
    assert freed == [0], "the adapter left first, and one more try was enough"
    assert h.reason(request) == "length"
    h.assert_answers()


def test_who_runs_short_alone_gets_the_adapters_memory_of_the_others() -> None:
    h = harness()
    others = [h.submit([index], ONE, params=LONG) for index in range(2)]
    while not all(map(h.tokens, others)):
        h.turn()
        while h.loads:
            h.answer_load(h.loads[0])
    large = h.submit([9] * 6, BIG, params=LONG)

    def fail(step: Step) -> None:
        is_large = h.engine.residency._resident.get(BIG.digest)
        if is_large is not None and len(h.engine.residency.resident()) > 1 and len(h.tokens(large)) < 2:
            raising_on([large], MEMORY)(step)

    h.runner.fail = fail
    h.run()
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    h.assert_answers()


def test_who_does_not_fit_alone_is_told_to_try_later() -> None:
    h = harness()
    others = neighbours(h, 7)
    culprit = h.submit([9, 9, 9], params=LONG)
    h.runner.fail = raising_on([culprit], MEMORY)
    h.run()
    finish = h.finish(culprit)
    assert finish is not None
    assert finish.error is not None
    assert (finish.error.code, finish.error.reason) == (Code.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED")
    assert finish.error.retry_after_s is not None
    assert [h.reason(request) for request in others] == ["length"] * 7
    assert not h.num_down
    h.assert_answers()


def test_an_adapter_that_finds_no_device_memory_ends_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    h = harness()
    beside = h.submit([2], TWO, params=LONG)
    while not h.tokens(beside):
        h.turn()
        while h.loads:
            h.answer_load(h.loads[0])
    transfer = h.runner.slots._transfer
    with monkeypatch.context() as patch:
        patch.setattr(h.runner.slots, "_transfer", _NoRoom())
        request = h.submit([1], ONE)
        h.turn()
        h.answer_load(ONE.digest)
        h.turn(2)
        assert h.reason(request) == "POOL_EXHAUSTED"
    assert h.runner.slots._transfer is transfer
    again = h.submit([1], ONE)
    h.run()
    assert h.reason(again) == h.reason(beside) == "length"
    assert not h.num_down
    h.assert_answers()


class _NoRoom:
    def stage(self, buffer: object) -> Any:
        raise MEMORY


def _raise(error: Exception) -> None:
    raise type(error)(*error.args)


# -- the device and the engine itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "alive", "down"),
    [
        ("Triton Error [CUDA]: an illegal memory access was encountered", True, True),
        ("CUDA error: an illegal memory access was encountered", True, True),
        ("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx", True, True),
        ("of a library that nobody knows", False, True),
        ("of a library that nobody knows", True, False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False, False),
    ],
)
def test_whether_the_device_is_lost_is_told_by_the_error_or_by_the_device(text: str, alive: bool, down: bool) -> None:
    """T22 (b), (c), (d)."""
    h = harness()
    requests = [h.submit([index], params=LONG) for index in range(5)]
    h.runner.alive = alive
    h.runner.fail = raising_on(requests[:1], RuntimeError(text))
    for _ in range(200):
        h.engine.run_once()
        if h.num_down or all(map(h.finish, requests)):
            break
    assert h.num_down == down
    reasons = [h.reason(request) for request in requests]
    assert reasons == [ENGINE_DOWN] * 5 if down else reasons[1:] == ["length"] * 4


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [KERNEL, MEMORY])
def test_an_engine_that_fails_every_step_goes_down(at_once: bool, error: Exception) -> None:
    """T22 (b): 20 of 20 fail."""
    h = harness()
    h.runner.fail = lambda step: _raise(error)
    requests: list[Request] = []
    while len(requests) < 20:
        requests.append(h.submit([len(requests)], params=LONG))
        if not at_once:
            h.turn()
    for _ in range(2 * FAILURES_MAX):  # without memory, each makes way for another one
        h.engine.run_once()
        if h.num_down:
            break
    assert h.num_down == 1
    reasons = [h.reason(request) for request in requests]
    expected = "STEP_FAILED" if error is KERNEL else "POOL_EXHAUSTED"
    assert at_once or reasons[:FAILURES_MAX] == [expected] * FAILURES_MAX
    assert set(reasons) <= {expected, ENGINE_DOWN}


def test_requests_that_fail_one_after_another_do_not_take_a_sound_engine_along() -> None:
    """A negative control: a caller could else stop the server with the same request again and again."""
    h = harness()
    for _ in range(3 * FAILURES_MAX):
        culprit = h.submit([9], params=LONG)
        h.runner.fail = raising_on([culprit])
        h.run()
        assert h.reason(culprit) == "STEP_FAILED"
    assert not h.num_down
    good = h.submit([1])
    h.run()
    finish = h.finish(good)
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH
    h.assert_answers()
