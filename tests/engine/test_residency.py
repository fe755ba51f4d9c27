"""Which adapters are on the device and which are evicted: bytes, holds, pins, and late loads."""

from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fakes import UNIT_BYTES, FakeAdapter, FakeLoader, FakeRunner, VirtualCell, check_blocks
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter
from weft.engine.block_manager import BlockManager
from weft.engine.observer import Observer
from weft.engine.outbox import AdaptersResident, EngineEvent, Outbox
from weft.engine.request import Request, RequestId, SamplingParams
from weft.engine.residency import Residency
from weft.errors import AdapterConflict, DataLoss, Overloaded, WeftError
from weft.metrics import Metrics

A, B, C = FakeAdapter(1), FakeAdapter(2), FakeAdapter(3)
BIG = FakeAdapter(4, units=2)
P, Q = FakeAdapter(5, num_virtual=5), FakeAdapter(6, num_virtual=3)
SOFT = FakeAdapter(7, num_virtual=5, is_soft=True)
ALL = {adapter.digest: adapter for adapter in (A, B, C, BIG, P, Q, SOFT)}


BROKEN = DataLoss("BLOB_CORRUPT", "")


def fault() -> None:
    raise RuntimeError("a kernel failed")


class Device:
    """A residency with room for a number of units and blocks, and its requests for loads."""

    def __init__(self, *, units: int = 2, num_blocks: int = 8) -> None:
        self.runner = FakeRunner(block_size=4, capacity_bytes=units * UNIT_BYTES)
        self.blocks = BlockManager(num_blocks, 4)
        self.told: frozenset[AdapterDigest] = frozenset()  # resident adapters, as published
        self.metrics = Metrics()
        self.residency = Residency(
            self.runner, self.blocks, Observer(self.metrics), Outbox(self._published, 0.0), FakeLoader()
        )
        self._asked: list[AdapterDigest] = []

    @property
    def asked(self) -> list[AdapterDigest]:
        """Open loads."""
        self._asked += self.residency.take_wanted()
        return self._asked

    @property
    def evictions(self) -> float:
        """Adapters evicted for others."""
        (family,) = self.metrics.adapter_evictions.collect()
        return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))

    def _published(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            assert isinstance(event, AdaptersResident)
            assert len(event.digests ^ self.told) == 1, "one comes or goes at a time"
            self.told = event.digests

    def request(self, *adapters: FakeAdapter) -> Request:
        return Request(
            request_id=RequestId("r"),
            prompt_token_ids=(1,),
            params=SamplingParams(),
            adapters=tuple(adapter.use() for adapter in adapters),
        )

    def answer(self) -> None:
        while self.asked:
            digest = self.asked.pop(0)
            self.residency.arrived(digest, ALL[digest].packed())

    def bring(self, *adapters: FakeAdapter) -> Request:
        """Return an admitted request, after completing the loads that it needs."""
        request = self.request(*adapters)
        if not self.residency.admit(request):
            self.answer()
            assert self.residency.admit(request)
        return request

    def leave_idle(self, *adapters: FakeAdapter) -> None:
        for adapter in adapters:
            self.residency.release(self.bring(adapter))

    def preload(self, adapter: FakeAdapter, *, packed: PackedAdapter | None = None, pin: bool = False) -> Future[None]:
        future: Future[None] = Future()
        self.residency.preload(adapter.digest, future, packed=packed, pin=pin)
        return future

    @property
    def resident(self) -> set[int]:
        assert self.told == self.residency.resident()
        return {int(digest, 16) for digest in self.told}


def test_a_missing_adapter_is_asked_for_once_and_held_from_admission_to_release() -> None:
    device = Device()
    first, second = device.request(A), device.request(A)
    assert not device.residency.admit(first)
    assert not device.residency.admit(second)
    assert device.asked == [A.digest]
    assert device.residency.is_loading(first)
    device.answer()
    assert not device.residency.is_loading(first)
    assert device.residency.admit(first)
    assert device.residency.admit(first), "asking again changes nothing"
    assert device.residency.admit(second)
    assert device.residency.slots_of[first] == device.residency.slots_of[second]
    device.residency.release(first)
    assert device.residency.evict(A.digest) is None, "a request holds it"
    assert device.resident == {1}
    device.residency.release(second)
    assert device.residency.evict(A.digest) == UNIT_BYTES
    assert device.resident == set()


def test_a_request_without_adapters_is_admitted_and_holds_nothing() -> None:
    device = Device(units=0)
    request = device.request()
    assert device.residency.admit(request)
    assert device.residency.slots_of[request] == ()
    device.residency.release(request)
    assert device.residency.slots_of == {}


def test_the_longest_unused_leaves_first_and_use_is_counted_to_its_end() -> None:
    device = Device(units=2)
    long_running = device.bring(A)
    device.leave_idle(B)
    device.residency.release(long_running)  # A was used last, though admitted first
    device.leave_idle(C)
    assert device.resident == {1, 3}
    device.leave_idle(A)
    device.leave_idle(B)
    assert device.resident == {1, 2}
    assert device.evictions == 2


def test_held_adapters_stay_and_the_newcomer_waits() -> None:
    device = Device(units=2)
    held = device.bring(A)
    device.leave_idle(B)
    newcomer = device.request(BIG)
    assert not device.residency.admit(newcomer)
    device.answer()
    assert not device.residency.admit(newcomer)
    assert device.resident == {1, 2}, "nobody leaves where that would not be enough"
    assert device.evictions == 0
    device.residency.release(held)
    assert device.residency.admit(newcomer)
    assert device.resident == {4}


def test_pinned_adapters_stay_until_unpinned() -> None:
    device = Device(units=1)
    device.preload(A, pin=True)
    device.answer()
    assert device.resident == {1}, "a pin brings its adapter in"
    newcomer = device.request(B)
    device.residency.admit(newcomer)
    device.answer()
    assert not device.residency.admit(newcomer)
    device.residency.unpin(A.digest)
    assert device.residency.admit(newcomer)
    assert device.resident == {2}


def test_a_preload_brings_an_adapter_in_and_may_drive_out_an_idle_one() -> None:
    device = Device(units=1)
    device.leave_idle(A)
    calls = [device.preload(B), device.preload(B)]
    assert device.asked == [B.digest]
    assert not calls[0].done()
    device.answer()
    assert [call.result(timeout=0) for call in calls] == [None, None]
    assert device.resident == {2}
    assert device.preload(B).done(), "it is there already"


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_packed_adapter_that_is_given_spares_the_load(is_loading: bool) -> None:
    device = Device()
    asked = device.request(A)
    if is_loading:
        assert not device.residency.admit(asked)
        assert device.asked == [A.digest]
    call = device.preload(A, packed=A.packed(), pin=True)
    assert call.result(timeout=0) is None
    assert device.resident == {1}
    device.answer()
    assert device.residency._arrived == {}, "what comes from the disk after it is not kept"
    assert device.asked == []
    assert device.residency.admit(asked)


def test_a_given_packed_adapter_without_room_is_not_kept() -> None:
    device = Device(units=1)
    device.bring(A)
    call = device.preload(B, packed=B.packed(), pin=True)
    with pytest.raises(Overloaded):
        call.result(timeout=0)
    device.residency.unpin(B.digest)
    assert device.residency._arrived == {}
    assert device.asked == []


def test_a_preload_that_finds_no_room_says_so() -> None:
    device = Device(units=1)
    device.bring(A)
    call = device.preload(B)
    device.answer()
    with pytest.raises(Overloaded):
        call.result(timeout=0)
    assert device.residency._arrived == {}, "and keeps no packed adapter"


@pytest.mark.parametrize("end", ["failed", "evicted", "abandoned"])
def test_who_waits_for_an_adapter_is_told_when_it_will_not_come(end: str) -> None:
    device = Device()
    call = device.preload(A)
    if end == "failed":
        device.residency.failed(A.digest, BROKEN)
    elif end == "evicted":
        device.residency.evict(A.digest)
    else:
        device.residency.fail_all(BROKEN)
    with pytest.raises(AdapterConflict if end == "evicted" else DataLoss):
        call.result(timeout=0)
    device.answer()
    assert device.resident == set()


def test_adapters_of_one_request_come_together_or_not_at_all() -> None:
    device = Device(units=2)
    both = device.request(A, BIG)
    assert not device.residency.admit(both)
    device.answer()
    assert not device.residency.admit(both)
    assert device.resident == set()
    device.leave_idle(B, C)
    fitting = device.bring(A, C)
    assert len(device.residency.slots_of[fitting]) == 2
    assert device.resident == {1, 3}, "C was there and stayed, B made room for A"


def test_the_order_of_slots_is_the_order_of_adapters() -> None:
    device = Device(units=3)
    device.leave_idle(B)
    request = device.bring(C, B, A)
    slots = device.residency.slots_of[request]
    assert [device.runner._watermark(slot) for slot in slots] == [3, 2, 1]


@pytest.mark.parametrize("adapter", [P, SOFT])
def test_virtual_positions_are_written_once_shared_and_given_back(adapter: FakeAdapter) -> None:
    device = Device(num_blocks=4)
    users = [device.bring(adapter), device.bring(adapter)]
    assert device.blocks.num_used_blocks == 2
    assert users[0].virtual_blocks == users[1].virtual_blocks
    cells = [device.runner.cells[users[0].virtual_blocks[index // 4] * 4 + index % 4] for index in range(5)]
    assert cells == [VirtualCell(adapter.watermark, index) for index in range(5)]
    for user in users:
        device.residency.release(user)
    assert device.blocks.num_used_blocks == 2, "the resident adapter keeps them"
    freed = 5 * 2 * torch.float32.itemsize  # keys and values of the only layer, of one number each
    assert device.residency.evict(adapter.digest) == freed
    assert device.blocks.num_used_blocks == 0


def test_virtual_positions_of_several_adapters_are_placed_together_in_the_order_of_the_request() -> None:
    device = Device(num_blocks=5)
    both, one = device.bring(Q, A, P), device.bring(P)
    assert device.blocks.num_used_blocks == 3
    assert both.virtual_blocks[1:] == one.virtual_blocks
    cells = [[device.runner.cells.get(block * 4 + offset) for offset in range(4)] for block in both.virtual_blocks]
    of_q, of_p = ([VirtualCell(a.watermark, index) for index in range(a.num_virtual)] for a in (Q, P))
    assert cells == [[*of_q, None], of_p[:4], [of_p[4], None, None, None]]
    third = device.request(SOFT, Q)
    assert not device.residency.admit(third)
    device.answer()
    assert device.residency.admit(third), "two more blocks are all there is"
    device.residency.release(one)
    assert device.residency.evict(P.digest) is None, "the other request still holds it"
    device.residency.release(both)
    assert both.virtual_blocks == []
    assert device.residency.evict(P.digest) is not None
    assert device.residency.evict(Q.digest) is None
    assert device.blocks.num_used_blocks == 3
    check_blocks(device.blocks)


def test_adapters_whose_virtual_positions_do_not_fit_together_are_not_placed_one_by_one() -> None:
    device = Device(num_blocks=3)
    device.leave_idle(P)
    request = device.request(P, SOFT)
    assert not device.residency.admit(request)
    device.answer()
    assert not device.residency.admit(request)
    assert device.resident == {P.watermark}, "it was not driven out for half a request"
    assert not device.residency.can_fit(request)
    assert device.residency.can_fit(device.request(P, Q))


def test_soft_rows_that_cannot_be_computed_leave_nothing_and_are_told_of_once() -> None:
    device = Device()
    waits, call = device.request(SOFT), device.preload(SOFT)
    device.residency.admit(waits)
    device.runner.fail_virtual = fault
    device.answer()
    assert device.resident == set()
    assert device.blocks.num_used_blocks == len(device.runner.slots) == 0
    with pytest.raises(WeftError, match="virtual positions"):
        call.result(timeout=0)
    assert not device.residency.admit(waits)
    assert device.asked == [], "no second try before those who wait are told"
    assert {g: error.reason for g, error in device.residency.take_failures().items()} == {SOFT.digest: "STEP_FAILED"}
    assert device.residency.take_failures() == {}
    device.residency.release(waits)
    assert device.residency._arrived == {}
    device.runner.fail_virtual = lambda: None
    device.bring(SOFT)
    assert device.resident == {7}, "whoever asks for it again has it loaded"


def test_a_failure_of_one_adapter_leaves_the_others_of_its_request_alone() -> None:
    device = Device()
    waits = device.request(A, SOFT)
    device.runner.fail_virtual = fault
    device.residency.admit(waits)
    device.answer()
    assert not device.residency.admit(waits)
    assert set(device.residency.take_failures()) == {SOFT.digest}
    device.residency.release(waits)
    device.residency.release(device.bring(A))
    assert device.resident == {1}


def test_a_fault_that_spoils_the_device_is_not_contained() -> None:
    device = Device()

    def spoil() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.runner.fail_virtual = spoil
    with pytest.raises(RuntimeError, match="CUDA error"):
        device.bring(SOFT)


def test_virtual_positions_need_room_in_the_kv_pool() -> None:
    device = Device(num_blocks=2)
    device.leave_idle(P)
    device.leave_idle(Q)
    assert device.resident == {6}, "P's two blocks made way"
    device.leave_idle(A)
    held = device.bring(Q)
    waits = device.request(P)
    device.residency.admit(waits)
    device.answer()
    assert not device.residency.admit(waits)
    assert device.resident == {1, 6}, "weights give no KV room, so A stays"
    device.residency.release(held)
    assert device.residency.admit(waits)
    assert device.resident == {1, 5}


def test_kv_pressure_takes_idle_virtual_positions_only() -> None:
    device = Device()
    device.leave_idle(A, P)
    held = device.bring(Q)
    assert device.residency.evict_virtual()
    assert device.resident == {1, 6}
    assert not device.residency.evict_virtual()
    device.residency.release(held)
    device.preload(Q, pin=True)
    assert not device.residency.evict_virtual()


def test_an_adapter_evicted_while_it_was_on_its_way_does_not_come_back() -> None:
    """If it was unregistered in the meantime, nothing would ever remove it from the device."""
    device = Device()
    request = device.request(A)
    device.residency.admit(request)
    device.residency.release(request)
    assert device.residency.evict(A.digest) == 0
    device.answer()
    assert device.resident == set()
    assert device.residency._arrived == {}


def test_a_packed_adapter_that_nobody_waits_for_any_more_is_let_go() -> None:
    device = Device(units=1)
    held = device.bring(A)
    leaving = [device.request(B), device.request(B, C)]
    for request in leaving:
        device.residency.admit(request)
    device.residency.release(leaving[1])
    device.answer()
    assert set(device.residency._arrived) == {B.digest}, "C came after its only seeker had gone"
    device.residency.release(leaving[0])
    assert device.residency._arrived == {}
    device.residency.release(held)


def test_a_failed_load_is_asked_for_again_by_the_next_request() -> None:
    device = Device()
    device.residency.admit(device.request(A))
    device.asked.clear()
    device.residency.failed(A.digest, BROKEN)
    device.residency.admit(device.request(A))
    assert device.asked == [A.digest]


def test_waiting_requests_can_be_made_to_let_go() -> None:
    device = Device(units=1)
    preempted, base = device.bring(A), device.bring()
    assert device.residency.release_all([preempted, base])
    assert not device.residency.release_all([preempted, base])
    device.leave_idle(B)
    assert device.resident == {2}
    device.answer()
    assert not device.residency.admit(preempted)
    device.answer()
    assert device.residency.admit(preempted)


_adapters = st.sampled_from([A, B, C, BIG, P, Q, SOFT])
PRELOADS = "preload", "preload with packed adapter"
_operations = st.lists(
    st.tuples(
        st.sampled_from(
            [*["admit"] * 3, "end", *["arrive"] * 2, "fail", "pin", "unpin", *PRELOADS, "evict", "spoil"],
        ),
        st.lists(_adapters, min_size=1, max_size=2, unique=True),
        st.integers(0, 5),
    ),
    max_size=50,
)


@settings(max_examples=150, deadline=None)
@given(_operations, st.integers(1, 4), st.integers(2, 6))
def test_budget_and_holds_under_any_sequence(
    operations: Sequence[tuple[str, list[FakeAdapter], int]], units: int, num_blocks: int
) -> None:
    device = Device(units=units, num_blocks=num_blocks)
    residency, slots = device.residency, device.runner.slots
    requests: list[Request] = []
    pinned: set[AdapterDigest] = set()
    for operation, adapters, number in operations:
        digest = adapters[0].digest
        held = {use.digest for request in residency.slots_of for use in request.adapters}
        before = residency.resident()
        if operation == "admit":
            requests.append(device.request(*adapters))
            residency.admit(requests[-1])
        elif operation == "end" and requests:
            residency.release(requests.pop(number % len(requests)))
        elif operation in ("arrive", "fail") and device.asked:
            digest = device.asked.pop(number % len(device.asked))
            if operation == "fail":
                residency.failed(digest, BROKEN)
            else:
                residency.arrived(digest, ALL[digest].packed())
            for request in requests:
                residency.admit(request)
        elif operation == "unpin":
            residency.unpin(digest)
            pinned.discard(digest)
        elif operation in ("pin", *PRELOADS):
            packed = ALL[digest].packed() if operation == "preload with packed adapter" else None
            device.preload(adapters[0], packed=packed, pin=operation == "pin")
            pinned |= {digest} if operation == "pin" else set()
        elif operation == "evict" and digest not in held:
            residency.unpin(digest)
            pinned.discard(digest)
            assert residency.evict(digest) is not None
            assert digest not in residency.resident()
            before -= {digest}
        elif operation == "evict":
            assert residency.evict(digest) is None
        elif operation == "spoil":
            device.runner.fail_virtual = fault if number % 2 else lambda: None
        for digest in residency.take_failures():
            assert digest not in residency.resident()
            for request in [r for r in requests if digest in {use.digest for use in r.adapters}]:
                assert request not in residency.slots_of
                requests.remove(request)
                residency.release(request)
        assert before & (held | pinned) <= residency.resident(), "in use or pinned, and gone"
        assert slots.used_bytes == sum(
            ALL[g].units * UNIT_BYTES for g in residency.resident() if not ALL[g].num_virtual
        )
        assert slots.used_bytes <= slots.capacity_bytes
        check_blocks(device.blocks)
        virtual = sum(device.blocks.count(ALL[g].num_virtual) for g in residency.resident())
        assert device.blocks.num_used_blocks == virtual
        for request, request_slots in residency.slots_of.items():
            deltas = [
                (slot, use)
                for slot, use in zip(request_slots, request.adapters, strict=True)
                if not use.num_virtual_tokens
            ]
            assert [device.runner._watermark(slot) for slot, _ in deltas] == [int(u.digest, 16) for _, u in deltas]
    for request in requests:
        residency.release(request)
    for digest in ALL:
        residency.unpin(digest)
        residency.evict(digest)
    assert residency.resident() == frozenset()
    assert slots.used_bytes == len(slots) == device.blocks.num_used_blocks == 0
    assert residency._arrived == {}
    assert residency._seekers == set()
    assert residency._awaited == {}
