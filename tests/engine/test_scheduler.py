"""The choice of requests that run, as tables of events: no model, no sampler, no torch."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fakes import check_blocks
from weft.engine.block_manager import BlockManager
from weft.engine.request import FinishReason, Request, RequestId, RequestStatus, SamplingParams
from weft.engine.scheduler import OVERTAKEN_MAX, Scheduler

SIZE = 4


class Table:
    """A scheduler, and a computer that gives every sampling request the token 1000 + its length."""

    def __init__(self, *, num_blocks: int = 100, max_num_seqs: int = 8, budget: int = 16, caching: bool = True) -> None:
        self.blocks = BlockManager(num_blocks, SIZE, enable_prefix_caching=caching)
        self.absent: set[str] = set()  # requests whose adapters are being loaded
        self.no_room: set[str] = set()  # requests whose adapters have no room beside those in use
        self.asked: list[str] = []
        self.scheduler = Scheduler(
            self.blocks,
            self,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
        )

    def admit(self, request: Request) -> bool:
        self.asked.append(request.request_id)
        return request.request_id not in self.absent | self.no_room

    def is_loading(self, request: Request) -> bool:
        return request.request_id in self.absent

    def add(self, name: str, prompt: int | Sequence[int], **fields: Any) -> Request:
        """Add a request with this prompt, or one of so many tokens that no other prompt begins with."""
        tokens = [crc32(name.encode()), *range(prompt - 1)] if isinstance(prompt, int) else prompt
        request = Request(request_id=RequestId(name), prompt_token_ids=tuple(tokens), params=SamplingParams(), **fields)
        self.scheduler.add(request)
        return request

    def step(self) -> dict[str, int]:
        """Run one step; return {request: number of tokens}, in the order of its rows."""
        step = self.scheduler.schedule()
        sampling = [request for request, _ in (s for s in step if s.samples)]
        self.scheduler.advance(step)
        for request in sampling:
            request.output.append(1000 + request.num_tokens)
        check_blocks(self.blocks)
        return {request.request_id: num_tokens for request, num_tokens in step}

    def end(self, request: Request) -> None:
        request.finish(FinishReason.STOP)
        self.scheduler.remove(request)
        check_blocks(self.blocks)

    @property
    def waiting(self) -> str:
        return " ".join(request.request_id for request in self.scheduler.waiting)

    @property
    def running(self) -> str:
        return " ".join(request.request_id for request in self.scheduler.running)


def test_the_scheduler_side_knows_no_torch() -> None:
    """Importing these modules alone imports no tensor library."""
    source = "import sys, weft.engine.{0}; assert 'torch' not in sys.modules"
    for name in ("request", "block_manager", "scheduler"):
        subprocess.run([sys.executable, "-c", source.format(name)], check=True)


def test_prompts_are_computed_then_one_token_a_step() -> None:
    table = Table()
    table.add("a", 3)
    table.add("b", 5)
    assert [table.step() for _ in range(3)] == [{"a": 3, "b": 5}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]


def test_a_long_prompt_is_cut_into_budgets() -> None:
    table = Table(budget=16)
    a = table.add("a", 40)
    assert [table.step() for _ in range(4)] == [{"a": 16}, {"a": 16}, {"a": 8}, {"a": 1}]
    assert len(a.output) == 2, "only a step that reaches the last token samples"


def test_running_requests_come_before_waiting_ones() -> None:
    table = Table(budget=8)
    table.add("a", 3)
    table.step()
    table.add("b", 20)
    table.add("c", 2)
    assert [table.step() for _ in range(5)] == [
        {"a": 1, "b": 7},
        {"a": 1, "b": 7},
        {"a": 1, "b": 6, "c": 1},
        {"a": 1, "b": 1, "c": 1},
        {"a": 1, "b": 1, "c": 1},
    ]


def test_the_budget_is_never_passed_and_cuts_the_last_request() -> None:
    table = Table(budget=10)
    for name in "abc":
        table.add(name, 4)
    assert [table.step() for _ in range(3)] == [
        {"a": 4, "b": 4, "c": 2},
        {"a": 1, "b": 1, "c": 2},
        dict.fromkeys("abc", 1),
    ]


def test_no_more_than_max_num_seqs_run() -> None:
    table = Table(max_num_seqs=2)
    requests = {name: table.add(name, 2) for name in "abc"}
    assert table.step() == {"a": 2, "b": 2}
    assert table.waiting == "c"
    table.end(requests["a"])
    assert table.step() == {"b": 1, "c": 2}


def test_those_whose_adapter_is_loading_are_passed_without_losing_their_place() -> None:
    table = Table(max_num_seqs=2)
    table.absent = {"a", "c"}
    b = [table.add(name, 2) for name in "abcd"][1]
    assert table.step() == {"b": 2, "d": 2}
    assert table.waiting == "a c"
    assert table.step() == {"b": 1, "d": 1}
    table.absent = set()
    table.end(b)
    assert table.step() == {"d": 1, "a": 2}, "the first in line takes the first free seat"
    assert table.waiting == "c"


def test_who_waits_for_room_is_passed_so_often_and_no_more() -> None:
    table = Table(max_num_seqs=2)
    table.absent, table.no_room = {"loads"}, {"large"}
    table.add("loads", 2)
    large = table.add("large", 2)
    passed = [table.add(f"small-{i}", 2) for i in range(OVERTAKEN_MAX + 1)]
    for request in passed[:-1]:
        assert table.scheduler.blocked is None
        assert request.request_id in table.step()
        table.end(request)
    assert table.step() == {}
    assert table.scheduler.blocked is large
    table.no_room = set()
    assert table.step() == {"large": 2, passed[-1].request_id: 2}
    assert table.scheduler.blocked is None
    assert table.waiting == "loads", "a load that is on its way holds nobody up"


def test_a_loading_request_at_the_head_starves_nobody_and_is_asked_in_every_step() -> None:
    table = Table()
    table.absent = {"a"}
    table.add("a", 2)
    for name in "bcd":
        table.add(name, 2)
        table.step()
    assert table.running == "b c d"
    assert table.asked.count("a") == 3


def test_a_request_that_finds_no_room_holds_back_those_behind_it() -> None:
    """Otherwise a stream of small requests would keep a large one out for ever."""
    table = Table(num_blocks=4, budget=100)
    small = table.add("small", 4)
    table.step()
    large = table.add("large", 13)
    table.add("tiny", 1)
    assert table.step() == {"small": 1}
    assert table.waiting == "large tiny"
    table.end(small)
    assert table.step() == {"large": 13}
    table.end(large)
    assert table.step() == {"tiny": 1}


def test_a_prompt_starts_only_where_all_of_it_fits() -> None:
    table = Table(num_blocks=4, budget=4)
    table.add("a", 8)
    table.add("b", 9)
    assert [table.step() for _ in range(2)] == [{"a": 4}, {"a": 4}]
    assert table.waiting == "b"
    assert table.scheduler.num_preemptions == 0


def test_the_youngest_gives_way_and_computes_again() -> None:
    table = Table(num_blocks=4, budget=100, caching=False)
    a, b = table.add("a", 7), table.add("b", 7)
    assert table.step() == {"a": 7, "b": 7}
    assert table.step() == {"a": 1, "b": 1}
    assert table.step() == {"a": 1}, "a needs a third block, so b goes"
    assert table.scheduler.num_preemptions == 1
    assert b.status is RequestStatus.PREEMPTED
    assert (b.blocks, b.num_computed_tokens, len(b.output)) == ([], 0, 2)
    assert table.waiting == "b"
    table.end(a)
    assert table.step() == {"b": 9}, "its prompt and what it had generated"
    assert b.output == [1007, 1008, 1009]


def test_the_preempted_are_first_in_line_in_their_old_order() -> None:
    table = Table(num_blocks=6, budget=100, caching=False)
    a = table.add("a", 8)
    table.add("b", 8)
    table.add("c", 8)
    table.step()
    table.add("d", 1)
    assert table.step() == {"a": 1, "b": 1}, "c gives two blocks, which a and b take"
    assert table.waiting == "c d"
    for _ in range(3):
        table.step()
    assert table.step() == {"a": 1}
    assert table.waiting == "b c d"
    table.end(a)
    assert list(table.step()) == ["b"]
    assert table.waiting == "c d"


def test_a_request_alone_that_outgrows_the_pool_waits() -> None:
    """The engine ends it: see test_engine.py."""
    table = Table(num_blocks=2, budget=100, caching=False)
    table.add("a", 8)
    table.step()
    assert table.step() == {}
    assert (table.running, table.waiting) == ("", "a")
    assert table.step() == {}


def test_cached_tokens_are_not_computed_and_are_counted() -> None:
    table = Table()
    table.add("a", range(10))
    table.step()
    b = table.add("b", range(12))
    assert table.step() == {"a": 1, "b": 4}
    assert b.num_cached_tokens == 8


def test_a_preempted_request_finds_its_own_blocks_and_does_not_call_them_cached() -> None:
    table = Table(num_blocks=4, budget=100)
    a, b = table.add("a", 7), table.add("b", 7)
    for _ in range(3):
        table.step()
    assert table.waiting == "b"
    table.end(a)
    assert table.step() == {"b": 5}, "one of its two blocks has not been taken since"
    assert b.num_cached_tokens == 0, "nobody else had computed them"


def test_a_removed_request_leaves_nothing_wherever_it_was() -> None:
    table = Table(max_num_seqs=1)
    a, b = table.add("a", 20), table.add("b", 4)
    table.step()
    table.end(b)
    table.end(a)
    assert (table.running, table.waiting) == ("", "")
    assert table.blocks.num_used_blocks == 0


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 8), min_size=8, max_size=8),
    num_blocks=st.integers(5, 12),
    budget=st.integers(4, 20),
    max_num_seqs=st.integers(1, 4),
    caching=st.booleans(),
)
def test_everyone_gets_through_and_every_token_once(
    prompts: list[int], lengths: list[int], num_blocks: int, budget: int, max_num_seqs: int, caching: bool
) -> None:
    table = Table(num_blocks=num_blocks, max_num_seqs=max_num_seqs, budget=budget, caching=caching)
    requests = [table.add(str(index), length) for index, length in enumerate(prompts)]
    left = set(requests)
    for _ in range(500):
        step = table.step()
        assert sum(step.values()) <= budget
        assert len(step) == len(table.scheduler.running) <= max_num_seqs or sum(step.values()) == budget
        assert all(num_tokens > 0 for num_tokens in step.values())
        for request in [r for r in left if len(r.output) == lengths[requests.index(r)]]:
            table.end(request)
            left.remove(request)
        if not left:
            break
        assert step, "nothing runs although everything fits alone"
    assert not left
    assert table.blocks.num_used_blocks == 0
    for request in requests:
        first = request.num_prompt_tokens
        assert request.output == [1000 + first + index for index in range(len(request.output))]


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 9, 11])
def test_token_ids_cross_from_prompt_to_output(stop: int) -> None:
    request = Request(request_id=RequestId("a"), prompt_token_ids=tuple(range(5)), params=SamplingParams())
    request.output += range(5, 11)
    for start in range(stop):
        assert request.token_ids(start, stop) == list(range(11))[start:stop]
