"""Requests and adapters in any order: nothing leaks, no request is lost, every token comes from the leased weights.

The machine takes the parts of the engine's thread, the event loop and the adapter lifecycle at once: it drives the real
Engine and the real Registry, message by message, over the fake runner of `fakes.py`. The model beside them is a dict:
the current content of each id, and the adapters of each request.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tests.engine.fakes import GREEDY, UNIT_BYTES, VOCAB_SIZE, FakeAdapter, Harness
from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.registry import AdapterInfo, AdapterState, Registry, Version
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.engine import batch as batches
from weft.engine import block_manager, token_ranges
from weft.engine.block_manager import BlockManager
from weft.engine.engine import Engine
from weft.engine.request import Finish, FinishReason, Request, RequestId, SamplingParams
from weft.engine.residency import Residency
from weft.engine.scheduler import Scheduled, Scheduler
from weft.engine.token_ranges import OPEN, Ranges, TokenRange
from weft.errors import AdapterConflict, AdapterNotFound, AdapterUnusable, Cancelled, DataLoss, Unavailable, WeftError
from weft.kernels.step import Step
from weft.methods.protocol import Virtual
from weft.metrics import Metrics

IDS = [AdapterId(name) for name in ("a", "b", "c", "d")]
SHARED = [7, 3, 3, 9, 1, 4, 4, 4, 2, 8, 5, 6]
DEVICE_UNITS = 2
METRICS = Metrics()  # made once: it is the slowest part of an engine

ids = st.sampled_from(IDS)
contents = st.one_of(
    st.builds(lambda units: (units, 0, False), st.integers(1, 2)),
    st.builds(lambda count, is_soft: (0, count, is_soft), st.integers(1, 6), st.booleans()),
)
prompts = st.builds(
    lambda shared, own: SHARED[:shared] + own,
    st.integers(0, len(SHARED)),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
)
names = st.one_of(st.lists(ids, min_size=1, max_size=1), st.lists(ids, max_size=2, unique=True))
gates = st.sampled_from([1.0, 0.5])
ranges = st.one_of(
    st.just(()),
    st.builds(lambda begin: (TokenRange(begin, OPEN),), st.integers(1, 14)),
    st.builds(lambda begin, count: (TokenRange(begin, begin + count),), st.integers(0, 10), st.integers(1, 6)),
)
params = st.builds(
    lambda seed, length, stops: SamplingParams(
        temperature=1.0 if seed else 0.0, seed=seed, max_new_tokens=length, stop_token_ids=stops
    ),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.integers(1, 12),
    st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)


class EngineMachine(RuleBasedStateMachine):
    """The in-memory layer under any sequence of calls and faults."""

    @initialize(
        num_blocks=st.integers(11, 13),
        budget=st.integers(4, 24),
        num_seqs=st.integers(1, 5),
        caching=st.booleans(),
        host_units=st.integers(0, 4),
    )
    def begin(self, num_blocks: int, budget: int, num_seqs: int, caching: bool, host_units: int) -> None:
        self.harness = Harness(
            num_blocks=num_blocks,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(budget, num_seqs),
            capacity_bytes=DEVICE_UNITS * UNIT_BYTES,
            host_bytes=host_units * UNIT_BYTES,
            caching=caching,
            metrics=METRICS,
        )
        self.engine = self.harness.engine
        self.registry = Registry(wall_clock=lambda: 0.0)
        self.harness.on_finish = self.settle
        self.adapters: list[FakeAdapter] = []  # all contents so far
        self.current: dict[AdapterId, FakeAdapter] = {}
        self.leases: dict[RequestId, list[Version]] = {}
        self.removing: dict[AdapterId, list[Version]] = {}
        self.was_pinned = False
        for adapter_id, content in zip(IDS, [(1, 0, False), (0, 3, True), (0, 5, False), (2, 0, False)], strict=True):
            self.register(adapter_id, content)

    # -- the adapters --------------------------------------------------------------------------------------------

    @rule(adapter_id=ids, content=contents)
    def register(self, adapter_id: AdapterId, content: tuple[int, int, bool]) -> None:
        """Register new content under a free or a taken id."""
        self.publish(adapter_id, FakeAdapter(len(self.adapters) + 1, *content))

    @precondition(lambda self: self.adapters)
    @rule(adapter_id=ids, data=st.data())
    def register_again(self, adapter_id: AdapterId, data: st.DataObject) -> None:
        """Register content that was there before, under this id or another."""
        self.publish(adapter_id, data.draw(st.sampled_from(self.adapters)))

    def publish(self, adapter_id: AdapterId, adapter: FakeAdapter) -> None:
        digest = adapter.digest
        try:
            changes = self.registry.check_publish(adapter_id, digest, replace=True, expected_digest=None)
        except AdapterConflict:
            assert adapter_id in self.removing
            return
        if adapter not in self.adapters:
            self.adapters.append(adapter)
            self.harness.know(adapter)
        assert changes == (self.current.get(adapter_id) != adapter)
        if changes:
            info = AdapterInfo(num_virtual_tokens=adapter.num_virtual)
            version = Version(adapter_id=adapter_id, digest=digest, info=info, create_time_s=0.0)
            previous = self.registry.publish(version)
            if previous is not None and not previous.leases:
                self.went_idle(previous)
            self.current[adapter_id] = adapter

    @rule(adapter_id=ids, cancel=st.booleans())
    def unregister(self, adapter_id: AdapterId, cancel: bool) -> None:
        try:
            versions = self.registry.drain(adapter_id, None)
        except AdapterNotFound:
            assert adapter_id in self.removing or adapter_id not in self.current
            return
        self.removing[adapter_id] = versions
        if cancel:
            for request_id in [request_id for version in versions for request_id in version.leases]:
                error = AdapterConflict("ADAPTER_UNREGISTERED", "")
                self.engine.end(RequestId(request_id), FinishReason.ERROR, error)
        self.finish_removals()

    def finish_removals(self) -> None:
        """Finish removals as `UnregisterAdapter` does: when it returns, nothing of the adapter is left."""
        for adapter_id, versions in list(self.removing.items()):
            if any(version.leases for version in versions):
                continue
            self.registry.remove(versions[0])
            del self.removing[adapter_id], self.current[adapter_id]
            for digest in {version.digest for version in versions if not self.registry.of(version.digest)}:
                evicted = self.engine.evict(digest)
                self.turn()
                evicted.result(timeout=0)
                self.assert_gone(digest)

    def went_idle(self, version: Version) -> None:
        if not self.registry.of(version.digest):
            self.engine.evict(version.digest)

    def assert_gone(self, digest: object) -> None:
        residency, blocks = self.engine.residency, self.engine.blocks
        assert digest not in residency.resident()
        assert digest not in residency._arrived
        assert digest not in residency._pending
        assert not any(digest in digests for digests in blocks._digests_of.values())

    @rule(adapter_id=ids, how=st.sampled_from(["preload", "pin", "unpin", "evict"]))
    def move(self, adapter_id: AdapterId, how: str) -> None:
        """LoadAdapter and UnloadAdapter."""
        adapter = self.current.get(adapter_id)
        if adapter is None:
            return
        users = [v for current in self.registry for v in self.registry.versions(current.adapter_id)]
        if how == "evict" and not any(v.leases for v in users if v.digest == adapter.digest):
            self.engine.evict(adapter.digest)
        elif how != "evict":
            self.was_pinned |= how == "pin"
            if how == "unpin":
                self.engine.unpin(adapter.digest)
            else:
                self.engine.preload(adapter.digest, pin=how == "pin")

    # -- the requests --------------------------------------------------------------------------------------------

    @rule(
        asked=st.lists(st.tuples(names, prompts, params, gates), min_size=1, max_size=4),
        pinned_to=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 3)),
        patience=st.sampled_from([float("inf"), float("inf"), 3.0]),
        salt=st.sampled_from(["", "", "tenant"]),
        now=st.booleans(),
    )
    def generate(
        self,
        asked: list[tuple[list[AdapterId], list[int], SamplingParams, float]],
        pinned_to: int | None,
        patience: float,
        salt: str,
        now: bool,
    ) -> None:
        for names, prompt, params, gate in asked:
            self.generate_one(names, pinned_to, prompt, params, gate, patience, salt)
        if now:
            self.turn()

    @rule(
        adapter_id=ids,
        prompt=prompts,
        uses=st.lists(st.tuples(gates, ranges), min_size=1, max_size=3, unique=True),
        turns=st.integers(0, 4),
    )
    def generate_alike(
        self, adapter_id: AdapterId, prompt: list[int], uses: list[tuple[float, Ranges]], turns: int
    ) -> None:
        """Submit the same prompt, with other weights of the same adapter, on other tokens."""
        for gate, ranges in uses:
            self.generate_one([adapter_id], None, prompt, GREEDY, gate, float("inf"), "", ranges)
            self.step(turns, loads=True)

    def generate_one(
        self,
        names: list[AdapterId],
        pinned_to: int | None,
        prompt: list[int],
        params: SamplingParams,
        gate: float,
        patience: float,
        salt: str,
        ranges: Ranges = (),
    ) -> None:
        request_id = RequestId(str(len(self.harness.requests)))
        versions: list[Version] = []
        for name in names:
            adapter = self.current.get(name)
            digest = None
            if pinned_to is not None and pinned_to < len(self.adapters):
                digest = self.adapters[pinned_to].digest
            try:
                version = self.registry.require_active(AdapterReference(name, digest))
            except (AdapterNotFound, AdapterUnusable):
                is_current = adapter is not None and digest in (None, adapter.digest)
                assert not is_current or name in self.removing
                continue
            assert adapter is not None
            assert version.digest == adapter.digest, "the registry gave other content than the id's"
            if version in versions:
                continue
            self.registry.hold(version, request_id)
            versions.append(version)
        taken = [adapter for version in versions for adapter in self.adapters if adapter.digest == version.digest]
        gates = [gate + 0.25 * index for index, _ in enumerate(taken)]  # no two alike
        self.leases[request_id] = versions
        self.harness.submit(
            prompt,
            *taken,
            gates=gates,
            ranges=ranges,
            params=params,
            salt=salt,
            deadline_s=self.harness.now + patience,
        )

    def settle(self, request_id: RequestId, finish: Finish) -> None:
        for version in self.leases.pop(request_id):
            if self.registry.release(version, request_id):
                self.went_idle(version)
        if finish.error is not None and finish.error.reason == "POOL_EXHAUSTED":
            uses = {use.digest for use in self.harness.requests[request_id].adapters}
            units = sum(adapter.units for adapter in self.adapters if adapter.digest in uses)
            assert units > DEVICE_UNITS or self.was_pinned, "ended for want of room that there was"

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a request: its blocks are free after the next `run_once`."""
        request_id = data.draw(st.sampled_from(sorted(self.leases)))
        self.engine.end(request_id, FinishReason.CANCELLED, Cancelled("CANCELLED", ""))
        self.turn()
        assert self.harness.finish(request_id) is not None
        request = self.harness.requests[request_id]
        assert not request.blocks
        assert not request.virtual_blocks

    # -- time and faults -----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 6), loads=st.booleans())
    def step(self, count: int, loads: bool) -> None:
        for _ in range(count):
            while loads and self.harness.loads:
                self.harness.answer_load(self.harness.loads[0])
            self.turn()

    def turn(self) -> None:
        self.harness.turn()

    @precondition(lambda self: self.harness.loads)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def answer_load(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(set(self.harness.loads))))
        self.harness.answer_load(digest, DataLoss("BLOB_CORRUPT", "") if fails else None)
        self.turn()

    @rule(seconds=st.floats(0.1, 5.0))
    def wait(self, seconds: float) -> None:
        self.harness.now += seconds
        self.turn()
        assert not [r for r in map(self.request, self.leases) if r.deadline_s <= self.harness.now]

    @rule(poison=st.booleans(), name=ids, prompt=prompts)
    def disturb(self, poison: bool, name: AdapterId, prompt: list[int]) -> None:
        """Make a step fail, or give logits that are not finite; then one of the failed requests is repeated."""
        self.generate_one([name], None, prompt, GREEDY, 1.0, float("inf"), "")
        runner, before = self.harness.runner, list(self.leases)
        if poison:
            runner.poison = range(VOCAB_SIZE)
        else:
            runner.fail = _raise
        self.turn()
        runner.poison, runner.fail = (), lambda batch: None
        hit = [request_id for request_id in before if request_id not in self.leases]
        for request_id in hit:
            finish = self.harness.finish(request_id)
            assert finish is not None
            assert finish.error is not None
        if hit:
            last = self.request(hit[-1])
            digests = [use.digest for use in last.adapters]
            names = [name for name, adapter in self.current.items() if adapter.digest in digests]
            gate = min((use.gate for use in last.adapters), default=1.0)
            self.generate_one(names, None, list(last.prompt_token_ids), last.params, gate, float("inf"), "")
            self.turn()

    @rule(name=ids, prompt=prompts, fails=st.sampled_from([True, True, False]))
    def disturb_placement(self, name: AdapterId, prompt: list[int], fails: bool) -> None:
        """Let the base fail on an adapter's soft rows: the requests that wait for the adapter end with the reason."""
        before, unfit = set(self.leases), len(self.harness.failed)
        self.generate_one([name], None, prompt, GREEDY, 1.0, float("inf"), "")
        if fails:
            self.harness.runner.fail_virtual = _fault
        self.turn()
        while self.harness.loads:
            self.harness.answer_load(self.harness.loads[0])
        self.turn()
        self.harness.runner.fail_virtual = lambda: None
        failed = {digest for digest, _ in self.harness.failed[unfit:]}
        assert fails or not failed
        assert not failed & self.engine.residency.resident()
        for request_id in before | set(self.leases):
            waited = failed & {use.digest for use in self.request(request_id).adapters}
            assert not (waited and request_id in self.leases), "it waits for an adapter that nobody brings"

    def request(self, request_id: RequestId) -> Request:
        return self.harness.requests[request_id]

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_wrong(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.finish_removals()
        assert not self.harness.num_down
        open_requests = {request_id for request_id in self.harness.requests if not self.harness.finish(request_id)}
        assert open_requests == self.leases.keys(), "a lease is held exactly as long as its request"
        for adapter_id, adapter in self.current.items():
            version = self.registry.current(adapter_id)
            assert version is not None
            assert version.digest == adapter.digest
            assert version.state is (AdapterState.DRAINING if adapter_id in self.removing else AdapterState.ACTIVE)

    def teardown(self) -> None:
        """Let everything end; then the books must be empty and every answer right."""
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        harness.run(max_turns=200 + 40 * len(harness.requests))
        self.finish_removals()
        for adapter_id in list(self.current):
            self.unregister(adapter_id, cancel=False)
        harness.turn(2)
        assert not self.leases
        for request in harness.requests.values():
            ends = [event for event in harness.events[request.request_id] if event.finish is not None]
            assert len(ends) == 1
        harness.assert_answers()
        assert not len(self.registry)
        for adapter in self.adapters:
            self.assert_gone(adapter.digest)
        residency, blocks = self.engine.residency, self.engine.blocks
        assert not residency._resident
        assert not residency._arrived
        assert not residency.slots_of
        assert not len(harness.runner.slots)
        assert harness.runner.slots.used_bytes == 0
        assert blocks.num_used_blocks == 0
        assert not harness.num_down


def _raise(batch: object) -> None:
    raise RuntimeError("a kernel failed")


def _fault() -> None:
    raise RuntimeError("a kernel failed")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Faults are logged with their traceback; thousands of them are wanted here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


MACHINE = settings(
    max_examples=200,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
def test_nothing_leaks_and_every_token_is_from_the_pinned_weights() -> None:
    run_state_machine_as_test(EngineMachine, settings=MACHINE)


# -- negative controls: the machine sees what it is there to see ------------------------------------------------------


def _key_without_digests(patch: pytest.MonkeyPatch) -> None:
    real = block_manager.cache_root
    patch.setattr(block_manager, "cache_root", lambda salt, digest, adapters, *more: real(salt, digest, (), *more))


def _key_without_gates(patch: pytest.MonkeyPatch) -> None:
    real = block_manager.cache_root
    patch.setattr(
        block_manager,
        "cache_root",
        lambda salt, digest, adapters, *more: real(salt, digest, [use._replace(gate=1.0) for use in adapters], *more),
    )


def _key_without_ranged_adapters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(block_manager, "_acting", lambda uses, begin, end: ())


def _key_without_ranges(patch: pytest.MonkeyPatch) -> None:
    real = block_manager._acting
    patch.setattr(
        block_manager,
        "_acting",
        lambda uses, begin, end: [use._replace(ranges=()) for use in real(uses, begin, end)],
    )


def _purge_keeps_blocks_behind_a_range(patch: pytest.MonkeyPatch) -> None:
    """Purge a block only of the adapters that act in it, as if no other had shaped it."""
    real_commit, real_purge = BlockManager.commit, BlockManager.purge

    def commit(self: BlockManager, request: Request) -> None:
        before = set(self._digests_of)
        real_commit(self, request)
        for block in self._digests_of.keys() - before:
            index = request.blocks.index(block)
            begin, end = index * self.block_size, (index + 1) * self.block_size
            acting = [u for u in request.adapters if not u.ranges or token_ranges.clip(u.ranges, begin, end)]
            vars(self).setdefault("acting", {})[block] = {use.digest for use in acting}

    def purge(self: BlockManager, digest: AdapterDigest) -> int:
        behind = {b: digests for b, digests in self._digests_of.items() if digest not in vars(self)["acting"][b]}
        self._digests_of |= dict.fromkeys(behind, ())
        num_purged = real_purge(self, digest)
        self._digests_of |= behind
        return num_purged

    patch.setattr(BlockManager, "commit", commit)
    patch.setattr(BlockManager, "purge", purge)


def _ranges_are_not_cut(patch: pytest.MonkeyPatch) -> None:
    """Make one run of all rows of a request: an adapter that acts on the first row acts on all of them."""
    real = token_ranges.runs

    def runs(of: Sequence[Ranges], begin: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
        _, _, acting = next(real(of, begin, end))
        yield begin, end, acting

    patch.setattr(token_ranges, "runs", runs)


def _release_forgets_a_block(patch: pytest.MonkeyPatch) -> None:
    real = BlockManager.release

    def release(self: BlockManager, request: Request) -> None:
        del request.blocks[:1]
        real(self, request)

    patch.setattr(BlockManager, "release", release)


def _virtual_blocks_stay_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "unshare_virtual", lambda self, request: request.virtual_blocks.clear())


def _virtual_blocks_in_another_order(patch: pytest.MonkeyPatch) -> None:
    real = BlockManager.share_virtual

    def share(self: BlockManager, request: Request, blocks: list[int]) -> None:
        before, request.virtual_blocks = request.virtual_blocks, []
        real(self, request, blocks)
        request.virtual_blocks += before

    patch.setattr(BlockManager, "share_virtual", share)


def _gates_of_spans_are_lost(patch: pytest.MonkeyPatch) -> None:
    real = batches.build
    patch.setattr(batches, "build", lambda *given: _with_gates(real(*given), None))


def _with_gates(step: Step, log_gates: Tensor | None) -> Step:
    return step._replace(paging=step.paging._replace(log_gates=log_gates))


def _gates_of_spans_are_mixed_up(patch: pytest.MonkeyPatch) -> None:
    real = batches.build

    def build(*given: Any) -> Step:
        step = real(*given)
        gates = step.paging.log_gates
        return step if gates is None else _with_gates(step, gates.flip(0))

    patch.setattr(batches, "build", build)


def _non_finite_kv_stays_cached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "invalidate", lambda self, request: None)


def _purge_forgets_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "purge", lambda self, digest: 0)


def _holds_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "release", lambda self, request: self._blocks.unshare_virtual(request))


def _late_loads_are_placed(patch: pytest.MonkeyPatch) -> None:
    real = Residency.arrived

    def arrived(self: Residency, digest: AdapterDigest, packed: PackedAdapter) -> None:
        self._pending.add(digest)
        self._pinned.add(digest)
        real(self, digest, packed)
        self._pinned.discard(digest)

    patch.setattr(Residency, "arrived", arrived)


def _slots_of_another_request(patch: pytest.MonkeyPatch) -> None:
    real = batches.build

    def build(step: list[Scheduled], slots_of: dict[Request, tuple[AdapterSlot, ...]], *more: Any) -> Step:
        swapped = dict(slots_of)
        requests = [request for request, _ in step if request.adapters and not request.virtual_blocks]
        if len(requests) > 1 and len(slots_of[requests[0]]) == len(slots_of[requests[-1]]):
            swapped[requests[0]] = slots_of[requests[-1]]
        return real(step, swapped, *more)

    patch.setattr(batches, "build", build)


def _slots_are_not_cleared(patch: pytest.MonkeyPatch) -> None:
    """A slot given away twice: the second adapter is computed with the first one's weights."""
    real = SlotTable.put

    def put(self: SlotTable, packed: PackedAdapter) -> AdapterSlot | None:
        slot = real(self, packed)
        if slot is not None and len(self) > 1:
            self._held[slot].buffer = next(iter(self._held.values())).buffer
        return slot

    patch.setattr(SlotTable, "put", put)


def _failed_rows_are_taken_for_good(patch: pytest.MonkeyPatch) -> None:
    real = Residency._write_virtual

    def write(self: Residency, blocks: list[int], virtual: Virtual) -> None:
        real(self, blocks, virtual)

    patch.setattr(Residency, "_write_virtual", write)


def _nobody_is_told_of_failed_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "take_failures", lambda self: {})


def _blocks_of_failed_rows_are_lost(patch: pytest.MonkeyPatch) -> None:
    real = Residency._write_virtual

    def write(self: Residency, blocks: list[int], virtual: Virtual) -> WeftError | None:
        failure = real(self, blocks, virtual)
        if failure is not None:
            blocks.clear()
        return failure

    patch.setattr(Residency, "_write_virtual", write)


def _preempted_requests_are_lost(patch: pytest.MonkeyPatch) -> None:
    def preempt(self: Scheduler, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request)

    patch.setattr(Scheduler, "_preempt", preempt)


def _deadlines_are_told_twice(patch: pytest.MonkeyPatch) -> None:
    real = Engine._expire

    def expire(self: Engine, now: float) -> None:
        expired = [request for request in self._requests.values() if request.deadline_s <= now]
        real(self, now)
        for request in expired:
            self._outbox._publish([self._outbox._pending[request.request_id]])

    patch.setattr(Engine, "_expire", expire)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed_bug",
    [
        _key_without_digests,
        _key_without_gates,
        _key_without_ranged_adapters,
        _key_without_ranges,
        _purge_keeps_blocks_behind_a_range,
        _ranges_are_not_cut,
        _release_forgets_a_block,
        _virtual_blocks_stay_shared,
        _virtual_blocks_in_another_order,
        _gates_of_spans_are_lost,
        _gates_of_spans_are_mixed_up,
        _non_finite_kv_stays_cached,
        _purge_forgets_the_cache,
        _holds_never_end,
        _late_loads_are_placed,
        _slots_of_another_request,
        _slots_are_not_cleared,
        _failed_rows_are_taken_for_good,
        _nobody_is_told_of_failed_rows,
        _blocks_of_failed_rows_are_lost,
        _preempted_requests_are_lost,
        _deadlines_are_told_twice,
    ],
)
def test_the_machine_catches(seed_bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    seed_bug(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, Unavailable)):
        run_state_machine_as_test(EngineMachine, settings=settings(MACHINE, max_examples=1000, phases=[Phase.generate]))
