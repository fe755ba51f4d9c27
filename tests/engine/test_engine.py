"""The engine over a fake runner: every request ends once, faults stay contained, and room is freed."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.fakes import GREEDY, UNIT_BYTES, VOCAB_SIZE, FakeAdapter, Harness, Threaded, advance, expected_tokens
from weft.engine.endings import ENGINE_DOWN
from weft.engine.outbox import EngineEvent
from weft.engine.request import FinishReason, Request, RequestId, SamplingParams, TokenEvent
from weft.engine.scheduler import OVERTAKEN_MAX
from weft.errors import Cancelled, DataLoss, Unavailable, WeftError
from weft.kernels.step import Step
from weft.metrics import Metrics

METRICS = Metrics()
ONE, TWO, BIG = FakeAdapter(1), FakeAdapter(2), FakeAdapter(3, units=2)
PREFIX, SHORT = FakeAdapter(4, num_virtual=6), FakeAdapter(5, num_virtual=3)
CANCELLED = Cancelled("CANCELLED", "the caller went away")


def long(length: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=length, **params)


def harness(**config: Any) -> Harness:
    return Harness(metrics=METRICS, **config)


def cancel(h: Harness, request: Request) -> None:
    h.engine.end(request.request_id, FinishReason.CANCELLED, CANCELLED)


def failing(error: Exception, *, at: int) -> Callable[[Step], None]:
    """Return a function that raises at the nth forward from now."""
    left = iter(range(at, -1, -1))

    def fail(step: Step) -> None:
        if next(left, None) == 0:
            raise error

    return fail


# -- answers ---------------------------------------------------------------------------------------------------------


def test_requests_of_every_kind_answer_in_one_batch_as_they_would_alone() -> None:
    h = harness(num_blocks=100)
    prompt = list(range(11))
    h.submit(prompt, params=long(6))
    h.submit(prompt, ONE, params=long(6))
    h.submit(prompt, ONE, gates=[0.5], params=long(6))
    h.submit(prompt, ONE, BIG, gates=[0.5, 2.0], params=long(6))
    h.submit(prompt, PREFIX, params=long(6))
    h.submit(prompt, PREFIX, TWO, params=long(6))
    h.submit(prompt, params=SamplingParams(seed=3, max_new_tokens=6, repetition_penalty=1.5, min_new_tokens=2))
    h.run()
    h.assert_answers()
    assert len({tuple(h.tokens(request)) for request in h.requests.values()}) == 7
    assert max(len(step.paging.context_lens) for step in h.runner.steps) == 7


def test_two_prefixes_at_their_weights_answer_beside_others_as_they_would_alone() -> None:
    h = harness(num_blocks=100)
    prompt = list(range(11))
    composed = [
        h.submit(prompt, PREFIX, ONE, SHORT, gates=gates, params=long(6))
        for gates in ([1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [0.5, 1.0, 1.0], [2.0, -1.0, 0.25])
    ]
    composed.append(h.submit(prompt, SHORT, ONE, PREFIX, params=long(6)))
    h.submit(prompt, PREFIX, params=long(6))
    h.submit(prompt, params=long(6))
    h.run()
    h.assert_answers()
    assert max(len(step.paging.context_lens) for step in h.runner.steps) >= 5
    assert len({tuple(h.tokens(request)) for request in composed}) == len(composed), "order and weights mean something"
    assert h.engine.blocks.num_used_blocks == 2 + 1, "the residents'"


def test_virtual_positions_of_two_adapters_that_leave_no_room_for_a_token_end_their_request_only() -> None:
    h = harness(num_blocks=3)
    neither = h.submit([1], PREFIX, SHORT)
    one = h.submit([1, 2], PREFIX, params=long(2))
    h.run()
    assert (h.reason(neither), h.reason(one)) == ("POOL_EXHAUSTED", "length")
    h.assert_answers()


def test_a_prompt_in_chunks_answers_like_one_in_a_piece() -> None:
    for budget in (1, 3, 32):
        h = harness(max_num_batched_tokens=budget, max_num_seqs=1)
        h.submit(range(29), ONE)
        h.run()
        h.assert_answers()


def test_a_stop_token_ends_and_max_new_tokens_ends() -> None:
    h = harness()
    free = h.submit([5, 6], params=long(8))
    h.run()
    third = h.tokens(free)[2]
    stopped = h.submit([5, 6], params=long(8, stop_token_ids=frozenset({third})))
    held = h.submit([5, 6], params=long(8, stop_token_ids=frozenset({third}), min_new_tokens=4))
    h.run()
    assert h.tokens(stopped) == h.tokens(free)[: h.tokens(free).index(third) + 1]
    assert h.reason(stopped) == "stop"
    assert h.reason(free) == "length"
    assert len(h.tokens(held)) >= 4
    assert third not in h.tokens(held)[:4]
    h.assert_answers()


def test_a_request_ends_where_the_model_does_virtual_positions_included() -> None:
    h = harness(max_model_len=20)
    plain, prefixed = h.submit(range(10), params=long(50)), h.submit(range(10), PREFIX, params=long(50))
    h.run()
    assert (len(h.tokens(plain)), h.reason(plain)) == (10, "length")
    assert (len(h.tokens(prefixed)), h.reason(prefixed)) == (4, "length")


def test_events_come_in_the_order_of_tokens_and_the_last_one_ends() -> None:
    h = harness(max_num_batched_tokens=8)
    requests = [h.submit([index] * 6, params=long(5)) for index in range(4)]
    h.run()
    for request in requests:
        told = h.events[request.request_id]
        assert [len(event.tokens) for event in told] == [1] * 5
        assert [event.finish is not None for event in told] == [False] * 4 + [True]
        finish = told[-1].finish
        assert finish is not None
        assert (finish.num_prompt_tokens, finish.num_completion_tokens, finish.num_cached_tokens) == (6, 5, 0)


# -- the prefix cache ------------------------------------------------------------------------------------------------


def test_kv_of_the_same_tokens_is_not_shared_across_digests_gates_or_salts() -> None:
    h = harness(num_blocks=200)
    prompt = list(range(12))
    origins: list[tuple[Sequence[FakeAdapter], Sequence[float], str]] = [
        ([], [], ""),
        ([], [], "tenant"),
        ([ONE], [1.0], ""),
        ([ONE], [0.5], ""),
        ([TWO], [1.0], ""),
        ([ONE, TWO], [1.0, 1.0], ""),
        ([TWO, ONE], [1.0, 1.0], ""),
        ([PREFIX], [1.0], ""),
    ]
    for cached in (0, 8):
        for adapters, gates, salt in origins:
            request = h.submit(prompt, *adapters, gates=gates, salt=salt)
            h.run()
            h.assert_answers(request)
            finish = h.finish(request)
            assert finish is not None
            assert finish.num_cached_tokens == cached


def test_kv_same_id_new_digest_equals_cold() -> None:
    """Nothing that an id's old content left behind affects its new content: tokens and log-probabilities."""
    warm, cold = harness(), harness()
    params = long(6, logprobs=2)
    warm.submit(range(16), ONE, params=params)
    warm.run()
    after, fresh = warm.submit(range(16), TWO, params=params), cold.submit(range(16), TWO, params=params)
    warm.run()
    cold.run()
    after_events, fresh_events = warm.events[after.request_id], cold.events[fresh.request_id]
    assert [event.tokens for event in after_events] == [event.tokens for event in fresh_events]


def test_alternate_100_adapters_chunked_prefill_watermark() -> None:
    h = harness(num_blocks=40, max_num_batched_tokens=16, capacity_bytes=6 * UNIT_BYTES)
    adapters = [FakeAdapter(10 + n, units=1 + n % 2) for n in range(100)]
    for turn in range(2):
        for index, adapter in enumerate(adapters):
            h.submit([7] * (5 + index % 20), adapter, params=long(1 + index % 3))
            if index % 5 == turn:
                h.turn()
    h.run()
    h.assert_answers()
    assert h.engine.blocks.num_used_blocks == 0


# -- preemption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_a_tiny_pool_gives_the_tokens_of_a_large_one(caching: bool) -> None:
    answers, preemptions = [], []
    for num_blocks in (200, 14):
        h = harness(num_blocks=num_blocks, caching=caching)
        real, count = h.engine.scheduler._preempt, []

        def preempt(request: Request, real: Callable[[Request], None] = real, count: list[Request] = count) -> None:
            count.append(request)
            real(request)

        h.engine.scheduler._preempt = preempt
        for seed in range(6):
            adapters = [[], [ONE], [PREFIX]][seed % 3]
            params = SamplingParams(seed=seed, max_new_tokens=14, logprobs=1)
            h.submit([seed, 1, 2, 3, 4, 5], *adapters, params=params)
        h.run()
        h.assert_answers()
        answers.append([[event.tokens for event in h.events[request_id]] for request_id in h.requests])
        preemptions.append(len(count))
        assert all(finish is not None and finish.num_cached_tokens == 0 for finish in map(h.finish, h.requests))
    assert answers[0] == answers[1]
    assert preemptions[0] == 0 < preemptions[1]


# -- going before the end --------------------------------------------------------------------------------------------


def test_cancel_at_every_step_index() -> None:
    """Waiting, in its prompt, generating, in its last step: its blocks are free after the next `run_once`."""
    for index in range(12):
        h = harness(max_num_batched_tokens=4, max_num_seqs=2)
        request = h.submit(range(13), ONE, PREFIX, params=long(6))
        while h.engine.residency.resident() < {ONE.digest, PREFIX.digest} and not h.tokens(request):
            if index == 0:
                break
            h.turn()
            for digest in list(h.loads):
                h.answer_load(digest)
        h.turn(index)
        cancel(h, request)
        cancel(h, request)
        h.turn()
        assert h.finish(request) is not None
        assert (request.blocks, request.virtual_blocks) == ([], [])
        virtual = 2 if PREFIX.digest in h.engine.residency.resident() else 0
        assert h.engine.blocks.num_used_blocks == virtual
        h.assert_answers()


def test_a_cancel_after_the_end_and_of_an_unknown_request_is_nothing() -> None:
    h = harness()
    request = h.submit([1])
    h.run()
    cancel(h, request)
    h.engine.end(RequestId("unknown"), FinishReason.CANCELLED, CANCELLED)
    h.turn(2)
    assert [event.finish is not None for event in h.events[request.request_id]] == [False] * 3 + [True]
    assert not h.num_down


def test_a_queued_request_whose_time_has_come_never_runs() -> None:
    h = harness(max_num_seqs=1)
    running, queued = h.submit([1], params=long(8)), h.submit([VOCAB_SIZE], deadline_s=5.0)
    loading = h.submit([3], ONE, deadline_s=5.0)
    h.turn(2)
    h.now = 5.0
    h.turn()
    assert h.reason(queued) == h.reason(loading) == "DEADLINE_EXCEEDED"
    h.run()
    assert h.reason(running) == "length"
    assert not any(VOCAB_SIZE in batch.input_ids for batch in h.runner.steps), "a token that is never drawn"


def test_a_deadline_frees_a_running_request_within_one_step() -> None:
    h = harness()
    request = h.submit(range(9), PREFIX, params=long(20), deadline_s=1.0)
    h.turn()
    h.answer_load(PREFIX.digest)
    h.turn(4)
    assert len(h.tokens(request)) == 4
    h.now = 1.0
    h.turn()
    assert h.reason(request) == "DEADLINE_EXCEEDED"
    assert len(h.tokens(request)) == 4
    assert h.engine.blocks.num_used_blocks == 2, "the virtual blocks of the resident adapter"
    h.assert_answers()


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(5))
def test_a_forward_that_fails_once_ends_nobody_in_a_batch(k: int) -> None:
    h = harness(max_num_seqs=2)
    h.runner.fail = failing(RuntimeError("a kernel failed"), at=k)
    for index in range(6):
        h.submit([index, 5], *([ONE] if index < 2 else []), params=long(8))
    h.run()
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    assert not h.num_down
    assert h.engine.blocks.num_used_blocks == 0
    h.assert_answers()


def test_rows_that_are_not_finite_end_their_request_and_leave_no_kv_behind() -> None:
    h = harness()
    h.runner.poison = {9}
    bad = h.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], ONE)
    base = h.submit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    good = h.submit([1, 2, 3, 4, 5, 6, 7, 8, 1], ONE)
    h.run()
    assert (h.reason(bad), h.reason(base), h.reason(good)) == ("ADAPTER_NON_FINITE", "NON_FINITE", "length")
    h.runner.poison = ()
    again = h.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], ONE)
    h.run()
    h.assert_answers()
    finish = h.finish(again)
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def until_down(h: Harness) -> tuple[Request, Future[int]]:
    """Run the engine until it goes down, as its thread would; then a request and a call come late."""
    for _ in range(20):
        h.engine.run_once()
        if h.num_down:
            break
    assert h.num_down == 1
    h.engine.stop()
    return h.submit([3]), h.inbox.call(lambda: 1)


@pytest.mark.usefixtures("quiet")
def test_a_cuda_error_takes_the_engine_down_and_everyone_is_told() -> None:
    h = harness(max_num_seqs=1)
    h.runner.fail = failing(RuntimeError("CUDA error: an illegal memory access was encountered"), at=2)
    running, waiting = h.submit([1], params=long(9)), h.submit([2])
    late, future = until_down(h)
    assert h.reason(running) == h.reason(waiting) == ENGINE_DOWN
    assert h.reason(late) == ENGINE_DOWN
    with pytest.raises(Unavailable):
        future.result(timeout=0)


@pytest.mark.usefixtures("quiet")
def test_out_of_memory_is_no_reason_to_go_down() -> None:
    h = harness()
    h.runner.fail = failing(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), at=1)
    request = h.submit([1], params=long(9))
    h.run()
    assert h.reason(request) == "length"
    assert not h.num_down
    h.assert_answers()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("broken", ["scheduler.remove", "residency.release", "scheduler.schedule", "blocks.commit"])
def test_a_fault_of_the_books_takes_the_engine_down_and_everyone_is_told_once(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = harness(max_num_seqs=2)
    requests = [h.submit([index], params=long(2 + index)) for index in range(4)]

    def fault(*_: object) -> None:
        raise KeyError("our own bug")

    h.engine.run_once()
    owner, method = broken.split(".")
    monkeypatch.setattr(getattr(h.engine, owner), method, fault)
    late, _ = until_down(h)
    assert h.reason(late) == ENGINE_DOWN
    for request in requests:
        assert [event.finish is not None for event in h.events[request.request_id]].count(True) == 1
        assert h.events[request.request_id][-1].finish is not None
    assert h.reason(requests[-1]) == ENGINE_DOWN


@pytest.mark.usefixtures("quiet")
def test_a_caller_that_gave_up_its_call_does_not_take_the_engine_along() -> None:
    """A cancelled RPC cancels the future it waits for."""
    h = harness()
    request = h.submit([1])
    future = h.inbox.call(lambda: 1)
    assert future.cancel()
    h.run()
    assert not h.num_down
    h.assert_answers(request)


def test_a_call_gives_its_result_or_its_error() -> None:
    h = harness()
    good, bad = h.inbox.call(lambda: 41 + 1), h.inbox.call(lambda: [][0])
    h.turn()
    assert good.result(timeout=0) == 42
    with pytest.raises(IndexError):
        bad.result(timeout=0)
    assert not h.num_down


# -- adapters --------------------------------------------------------------------------------------------------------


def test_a_request_whose_adapter_loads_slowly_waits_while_the_others_step() -> None:
    h = harness()
    slow, other, base = h.submit([1], ONE), h.submit([2], TWO), h.submit([3])
    h.turn()
    assert h.loads == [ONE.digest, TWO.digest]
    h.answer_load(TWO.digest)
    h.turn(8)
    assert h.reason(other) == h.reason(base) == "length"
    assert h.events.get(slow.request_id) is None
    again = h.submit([4], ONE)
    h.turn(3)
    assert h.loads == [ONE.digest], "it is asked for once"
    h.run()
    h.assert_answers(slow, again)


def test_what_a_queued_request_needs_is_brought_before_its_turn() -> None:
    h = harness(max_num_seqs=1)
    first = h.submit([3, 4], params=long(6))
    h.turn()
    second = h.submit([5, 6], ONE)
    h.turn()
    assert h.loads == [ONE.digest], "it is asked for while the only place is taken"
    h.answer_load(ONE.digest)
    h.turn()
    assert not h.engine.residency.resident(), "and the device is not touched for it"
    h.run()
    h.assert_answers(first, second)


def test_a_load_that_fails_ends_those_who_wait_for_it() -> None:
    h = harness()
    waiters = [h.submit([1], ONE), h.submit([2], ONE, TWO)]
    others = [h.submit([3], TWO), h.submit([4])]
    h.turn()
    h.answer_load(ONE.digest, DataLoss("BLOB_CORRUPT", "its files changed"))
    h.turn()
    assert [h.reason(waiter) for waiter in waiters] == ["BLOB_CORRUPT"] * 2
    h.run()
    assert [h.reason(other) for other in others] == ["length"] * 2
    later = h.submit([1], ONE)
    h.turn()
    assert h.loads == [ONE.digest], "the next request asks again"
    h.run()
    h.assert_answers(later)


def test_adapters_that_never_fit_together_end_their_request_only() -> None:
    """Before that, they do not evict each other, or other requests' adapters, for ever."""
    h = harness(capacity_bytes=2 * UNIT_BYTES)
    impossible = h.submit([1], ONE, BIG, params=long(3))
    others = [h.submit([2], TWO), h.submit([3], BIG), h.submit([4], ONE, TWO), h.submit([5])]
    h.run(max_turns=60)
    assert h.reason(impossible) == "POOL_EXHAUSTED"
    assert [h.reason(other) for other in others] == ["length"] * 4
    h.assert_answers()


def test_a_request_without_room_for_its_adapter_does_not_drive_out_what_others_need() -> None:
    h = harness(capacity_bytes=3 * UNIT_BYTES)
    holder = h.submit([1], BIG, params=long(30))
    h.turn()
    h.answer_load(BIG.digest)
    h.turn()
    large = h.submit([2], FakeAdapter(8, units=2))
    for _ in range(3):
        small = h.submit([3], ONE)
        for _ in range(8):
            h.turn()
            for digest in list(h.loads):
                h.answer_load(digest)
        assert h.reason(small) == "length"
    assert h.finish(large) is None
    assert h.finish(holder) is None
    h.run()
    h.assert_answers()


def test_a_large_adapter_gets_its_room_under_unending_traffic_of_others() -> None:
    h = harness(capacity_bytes=3 * UNIT_BYTES)
    large = FakeAdapter(8, units=3)
    traffic = [h.submit([1], ONE, params=long(3)), h.submit([2], TWO, params=long(4))]
    h.turn()
    waits = h.submit([3], large, params=long(2))
    for _ in range(20 * OVERTAKEN_MAX):
        while h.loads:
            h.answer_load(h.loads[0])
        h.turn()
        if h.finish(waits):
            break
        traffic = [request for request in traffic if not h.finish(request)]
        while len(traffic) < 4:
            traffic.append(h.submit([len(traffic)], ONE if len(traffic) % 2 else TWO, params=long(3)))
    assert h.reason(waits) == "length"
    assert waits.num_overtaken == OVERTAKEN_MAX
    h.run()
    h.assert_answers()


def test_who_cannot_fit_beside_pinned_adapters_ends_and_holds_up_nobody() -> None:
    h = harness(capacity_bytes=3 * UNIT_BYTES)
    h.know(ONE)
    h.engine.preload(ONE.digest, pin=True)
    h.turn()
    h.answer_load(ONE.digest)
    runs = h.submit([1], ONE, params=long(40))
    h.turn()
    large = h.submit([2], FakeAdapter(8, units=3))
    h.turn()
    h.answer_load(h.loads[0])
    for _ in range(2 * OVERTAKEN_MAX):
        h.submit([3], ONE, params=long(1))
        h.turn()
    assert h.reason(large) == "POOL_EXHAUSTED"
    h.turn(40)
    assert h.reason(runs) == "length"
    h.run()
    h.assert_answers()


def test_more_adapters_than_fit_take_turns() -> None:
    h = harness(capacity_bytes=2 * UNIT_BYTES, num_blocks=24)
    adapters = [FakeAdapter(10, units=1), FakeAdapter(11, units=2), FakeAdapter(12, num_virtual=9), FakeAdapter(13)]
    for index in range(24):
        h.submit([index % 7, 3], adapters[index * 5 % 4], params=long(1 + index % 4))
    h.run()
    h.assert_answers()
    assert all(h.reason(request) == "length" for request in h.requests.values())


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_that_can_never_fit_ends_and_the_queue_goes_on(caching: bool) -> None:
    h = harness(num_blocks=8, caching=caching, max_num_batched_tokens=8)
    before, never, after = h.submit([1], params=long(3)), h.submit(range(33)), h.submit([2])
    h.run(max_turns=40)
    assert [h.reason(request) for request in (before, never, after)] == ["length", "POOL_EXHAUSTED", "length"]
    h.assert_answers()


@pytest.mark.parametrize("caching", [True, False])
def test_idle_virtual_positions_make_way_for_a_request(caching: bool) -> None:
    """12 blocks; a prefix holds 2 of them; a request outgrows the other 10, in small chunks."""
    h = harness(num_blocks=12, caching=caching, max_num_batched_tokens=8)
    h.submit([1], PREFIX)
    h.run()
    assert h.engine.blocks.num_used_blocks == 2
    h.submit(range(38), params=long(8))
    h.run(max_turns=60)
    h.assert_answers()
    assert PREFIX.digest not in h.engine.residency.resident()


def test_pinned_virtual_positions_stay_and_the_request_ends() -> None:
    h = harness(num_blocks=12, caching=False, max_num_batched_tokens=8)
    h.know(PREFIX)
    h.engine.preload(PREFIX.digest, pin=True)
    h.turn()
    h.answer_load(PREFIX.digest)
    grows = h.submit(range(38), params=long(8))
    h.run(max_turns=60)
    assert h.reason(grows) == "POOL_EXHAUSTED"
    assert PREFIX.digest in h.engine.residency.resident()
    h.assert_answers()


def test_waiting_requests_let_go_of_adapters_that_the_first_in_line_has_no_room_beside() -> None:
    """Two requests outgrow the pool together; the younger one's prefix must not keep the older one out."""
    h = harness(num_blocks=8, caching=False, max_model_len=64)
    older = h.submit([1] * 18, params=long(12))
    younger = h.submit([2] * 3, PREFIX, params=long(4))
    h.run(max_turns=80)
    assert h.reason(older) == h.reason(younger) == "length"
    h.assert_answers()


# -- any order -------------------------------------------------------------------------------------------------------

_operations = st.lists(
    st.sampled_from(["submit", "submit", "submit loading", "cancel", "fail", "deadline", "turn", "turn", "load"]),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_operations, st.sampled_from(["stop", "cuda", "bug"]), st.data())
@pytest.mark.usefixtures("quiet")
def test_every_request_ends_once_however_the_engine_ends(operations: list[str], last: str, data: st.DataObject) -> None:
    h = harness(num_blocks=12, max_num_seqs=3)
    for operation in operations:
        if operation.startswith("submit"):
            adapters = [ONE] if "loading" in operation else []
            h.submit([len(h.requests)] * 5, *adapters, params=long(5), deadline_s=h.now + 3)
        elif operation == "cancel" and h.requests:
            cancel(h, h.requests[data.draw(st.sampled_from(sorted(h.requests)))])
        elif operation == "fail":
            h.runner.fail = failing(RuntimeError("a kernel failed"), at=0)
        elif operation == "deadline":
            h.now += 2
        elif operation == "load" and h.loads:
            h.answer_load(h.loads[0])
        else:
            h.turn()
    if last == "cuda":
        h.runner.fail = failing(RuntimeError("CUDA error: unspecified launch failure"), at=0)
        h.engine.run_once()
    elif last == "bug":
        h.engine.submit(None)  # type: ignore[arg-type]  # our own bug, outside a step
    h.engine.stop()
    late = h.submit([1])
    for request_id in h.requests:
        assert [event.finish is not None for event in h.events[request_id]].count(True) == 1
        assert h.events[request_id][-1].finish is not None
    assert h.reason(late) == ENGINE_DOWN
    h.assert_answers()


# -- the thread ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    h = Threaded(metrics=METRICS)
    yield h
    h.engine.stop(10.0)
    assert not h.engine._thread.is_alive()


def test_the_thread_answers_and_stops(threaded: Threaded) -> None:
    requests = [threaded.submit([index, 2, 3]) for index in range(20)]
    threaded.wait(*requests)
    threaded.assert_answers()


def test_stop_ends_the_waiting_and_the_running(threaded: Threaded) -> None:
    running, loading = threaded.submit([1], params=long(60)), threaded.submit([2], ONE)
    threaded.runner.fail = lambda batch: time.sleep(0.05)
    threaded.engine.stop(10.0)
    threaded.wait(running, loading)
    assert {threaded.reason(running), threaded.reason(loading)} <= {"DRAINING", ENGINE_DOWN}
    late = threaded.submit([3])
    threaded.wait(late, timeout_s=1.0)
    assert threaded.reason(late) == ENGINE_DOWN
    threaded.assert_answers()


def test_requests_that_race_with_the_stop_are_answered(threaded: Threaded) -> None:
    requests: list[Request] = []

    def send() -> None:
        requests.extend(threaded.submit([7]) for _ in range(200))

    sender = threading.Thread(target=send)
    sender.start()
    threaded.engine.stop(10.0)
    sender.join()
    threaded.wait(*requests)


@pytest.mark.usefixtures("quiet")
def test_after_a_cuda_error_nobody_waits_for_ever(threaded: Threaded) -> None:
    requests = [threaded.submit([index], adapter) for index, adapter in enumerate((ONE, TWO))]
    assert all(threaded.loader.came.acquire(timeout=20.0) for _ in requests)
    answered, failed = (threaded.loader.take(adapter.digest) for adapter in (ONE, TWO))
    threaded.runner.fail = failing(RuntimeError("CUDA error: device-side assert triggered"), at=1)
    requests += [threaded.submit([index], params=long(40)) for index in range(3)]
    threaded.wait(*requests)
    threaded.engine._thread.join(10.0)
    assert not threaded.engine._thread.is_alive()
    assert threaded.num_down == 1
    late = threaded.submit([3], ONE)
    threaded.wait(late, timeout_s=1.0)
    assert threaded.reason(late) == ENGINE_DOWN
    answered.set_result(ONE.packed())
    failed.set_exception(WeftError("INTERNAL", ""))
    threaded.engine.preload(TWO.digest)
    threaded.engine.end(late.request_id, FinishReason.CANCELLED, CANCELLED)
    assert not threaded.loads
    assert not len(threaded.runner.slots), "nothing touches the device any more"
    with pytest.raises(Unavailable):
        threaded.engine.evict(ONE.digest).result(timeout=1.0)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_does_not_leave_calls_hanging(threaded: Threaded) -> None:
    publish = threaded.engine._outbox._publish

    def broken(events: Sequence[EngineEvent]) -> None:
        if any(isinstance(event, TokenEvent) for event in events):
            raise RuntimeError("the event loop is closed")
        publish(events)

    threaded.engine._outbox._publish = broken
    threaded.submit([1])
    threaded.engine._thread.join(10.0)
    assert not threaded.engine._thread.is_alive()
    assert threaded.num_down == 1


def test_the_thread_sleeps_while_a_load_is_on_its_way_and_wakes_for_a_deadline(threaded: Threaded) -> None:
    turns = 0
    real = threaded.engine.scheduler.schedule

    def count() -> list[Any]:
        nonlocal turns
        turns += 1
        return real()

    threaded.engine.scheduler.schedule = count
    waits = threaded.submit([1], ONE, deadline_s=time.monotonic() + 0.3)
    patient = threaded.submit([1], ONE)
    threaded.wait(waits)
    assert threaded.reason(waits) == "DEADLINE_EXCEEDED"
    assert turns < 10, "the engine spins while it waits"
    threaded.answer_load(ONE.digest)
    threaded.wait(patient)
    threaded.assert_answers()


def test_stopping_an_engine_that_never_started_answers_too() -> None:
    h = harness()
    request = h.submit([1])
    h.engine.stop()
    late = h.submit([2])
    assert h.reason(request) in ("DRAINING", "length")
    assert h.reason(late) == ENGINE_DOWN


def test_the_fake_sees_what_it_should_see() -> None:
    """Negative control of the fake itself: a stale KV cell, a foreign adapter, a wrong position."""
    h = harness()
    request = h.submit(range(6), ONE, params=GREEDY)
    h.turn()
    h.answer_load(ONE.digest)
    h.turn(2)
    batch = h.runner.steps[-1]
    row = request.blocks[0] * 4 + 1
    cell = h.runner.cells[row]
    for spoiled in (None, h.runner.cells[row + 1]):
        h.runner.cells[row] = spoiled  # type: ignore[assignment]  # what it holds is wrong
        with pytest.raises(AssertionError):
            h.runner.forward(batch)
    h.runner.cells[row] = cell
    right = h.runner.forward(batch)
    with pytest.raises(AssertionError):
        h.runner.forward(batch._replace(positions=batch.positions + 1))
    assert len(h.runner.violations) == 3
    # The answer depends on the adapters that acted on a row or cell, not on those that the batch names.
    assert not right.equal(h.runner.forward(batch._replace(entries=None)))
    last = request.blocks[1] * 4 + 1
    h.runner.cells[last] = h.runner.cells[last]._replace(  # type: ignore[union-attr]
        deltas=(),
        digest=advance(h.runner.cells[last - 1].digest, request.prompt_token_ids[5], ()),  # type: ignore[union-attr]
    )
    assert not right.equal(h.runner.forward(batch))
    assert expected_tokens(request) != expected_tokens(h.submit(range(6), TWO, params=GREEDY))


# -- pacing ----------------------------------------------------------------------------------------------------------


def events_of(h: Harness, request: Request) -> list[int]:
    """Return how many tokens each event of a request had."""
    return [len(event.tokens) for event in h.events.get(request.request_id, ())]


def test_tokens_go_out_together_once_the_interval_has_passed_and_first_tokens_and_ends_at_once() -> None:
    h = harness(stream_interval_s=1.0)
    request = h.submit([1, 2], params=long(9))
    for _ in range(6):
        h.turn()
        h.now += 0.4
    assert events_of(h, request) == [1, 3], "at 0; then 0.4, 0.8 and 1.2 together, and 1.6 waits"
    other = h.submit([3], params=long(2))
    h.turn()
    assert events_of(h, other) == [1], "a first token waits for nobody"
    assert events_of(h, request) == [1, 3, 3], "and takes along what there is"
    h.turn()
    assert events_of(h, other) == [1, 1], "nor does an end"
    h.run()
    assert sum(events_of(h, request)) == 9
    h.assert_answers()


def test_everything_goes_out_in_every_step_where_the_interval_is_0() -> None:
    """Negative control of the above."""
    h = harness(stream_interval_s=0.0)
    request = h.submit([1, 2], params=long(9))
    h.run()
    assert events_of(h, request) == [1] * 9


def test_what_waits_to_go_out_comes_with_the_end_of_a_request_that_fails() -> None:
    h = harness(stream_interval_s=1e6)
    request = h.submit([1, 2], params=long(50))
    h.turn(4)
    assert events_of(h, request) == [1]
    cancel(h, request)
    h.turn()
    assert events_of(h, request) == [1, 3]
    assert h.reason(request) == "CANCELLED"


def test_nothing_waits_while_the_engine_sleeps() -> None:
    """Otherwise a preempted request would not receive its last tokens until it runs again."""
    h = harness(stream_interval_s=1e6)
    request = h.submit([1, 2], params=long(50))
    h.turn(3)
    assert events_of(h, request) == [1]
    h.engine.scheduler.running.clear()  # as if preempted, with everything else gone
    h.submit([4], params=long(1))
    h.engine.run_once(wait=True)
    assert sum(events_of(h, request)) == 3


# -- arrivals ----------------------------------------------------------------------------------------------------------


class Arriving(queue.SimpleQueue[Any]):
    """An inbox that gets a message whenever the engine waits at it for a while."""

    def __init__(self, come: Callable[[], object]) -> None:
        super().__init__()
        self.come = come
        self.waits: list[float | None] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.waits.append(timeout if block else 0.0)
        if block and timeout is not None:
            self.come()
        return super().get(block, timeout)


def test_requests_that_come_together_are_computed_together() -> None:
    h = harness()
    coming = [[3], [4, 5]]
    h.inbox._messages = Arriving(lambda: h.submit(coming.pop(), params=long(3)) if coming else None)
    h.submit([1, 2], params=long(3))
    h.engine.run_once(wait=True)
    assert [events_of(h, request) for request in h.requests.values()] == [[1], [1], [1]]
    h.run()
    h.assert_answers()


def test_who_comes_later_does_not_keep_the_first_waiting() -> None:
    h = harness()

    def come() -> None:
        h.now += 0.002
        h.submit([7], params=long(3))

    h.inbox._messages = Arriving(come)
    h.submit([1, 2], params=long(3))
    h.engine.run_once(wait=True)
    assert len(h.requests) == 4, "those of five milliseconds"
    assert all(events_of(h, request) == [1] for request in h.requests.values())


def test_nobody_is_waited_for_while_a_load_is() -> None:
    """It might come before its request has started, and would be requested again."""
    h = harness()
    inbox = h.inbox._messages = Arriving(lambda: h.submit([9], params=long(1)))
    request = h.submit([1], ONE, params=long(2))
    h.engine.run_once(wait=True)
    assert inbox.waits == [None, 0.0]
    h.run()
    assert sum(events_of(h, request)) == 2
