"""An engine without a model: a fake in place of `Runner.forward` that detects every wrong token, adapter and KV slot.

Each adapter is a *watermark*: a number that fills its weights or its virtual keys. The fake reads it back from the slot
memory and from its KV cells, so the result depends on the memory that was really written, never on a name. The next
token is drawn from a hash of (virtual positions, every token so far with the watermarks and gates that acted on it).
The hash of the tokens already computed is read from the KV cells. A wrong adapter, a stale block or a lost row
therefore gives other tokens than `expected_tokens`; `forward` detects a cell that does not continue the one before it.
"""

import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from hashlib import blake2b
from threading import Condition, Semaphore
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.config import EngineConfig
from weft.engine import block_manager, sampler
from weft.engine.block_manager import BlockManager
from weft.engine.engine import Engine
from weft.engine.inbox import Inbox
from weft.engine.outbox import AdapterFailed, EngineDown, EngineEvent
from weft.engine.request import (
    AdapterUse,
    ExpertBound,
    Finish,
    FinishReason,
    GateDetail,
    MixtureUse,
    Request,
    RequestId,
    SamplingParams,
    TokenEvent,
    canonical,
)
from weft.engine.token_ranges import Ranges
from weft.errors import WeftError
from weft.kernels.device import IN_PLACE
from weft.kernels.step import Step
from weft.methods import ia3, mixture, prefix, prompt
from weft.methods.protocol import Adapter, BaseShape, Site, SoftRows, Virtual
from weft.metrics import Metrics

VOCAB_SIZE = 32
UNIT_BYTES = 64  # the smallest packed adapter: one cache line
MAX_UNITS = 8
SHAPE = BaseShape(
    sites={
        f"site{units}": Site(units - 1, f"site{units}", 16 * units, 16 * units) for units in range(1, MAX_UNITS + 1)
    },
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    embedding_size=1,
    digest="base-digest",
    name="fake",
)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4)


class FakeAdapter(NamedTuple):
    """The content of an adapter: `units` · 64 bytes of weights, or `num_virtual` positions: soft rows or a prefix."""

    watermark: int
    units: int = 1
    num_virtual: int = 0
    is_soft: bool = False

    @property
    def digest(self) -> AdapterDigest:
        return AdapterDigest(f"{self.watermark:064x}")

    def use(self, gate: float = 1.0, ranges: Ranges = ()) -> AdapterUse:
        return AdapterUse(self.digest, gate, self.num_virtual, () if self.num_virtual else ranges)

    def packed(self) -> PackedAdapter:
        if self.is_soft:
            params = prompt.math.PromptParams(torch.full((self.num_virtual, 1), float(self.watermark)))
            adapter = Adapter(method=prompt.METHOD, config=prompt.math.PromptConfig(), sites={}, prefix=params)
        elif self.num_virtual:
            params = prefix.math.PrefixParams(torch.full((self.num_virtual, 1, 2, 1, 1), float(self.watermark)))
            adapter = Adapter(method=prefix.METHOD, config=prefix.math.PrefixConfig(), sites={}, prefix=params)
        else:
            params = ia3.math.Ia3Params(torch.full((16 * self.units,), float(self.watermark)), False)
            adapter = Adapter(method=ia3.METHOD, config=ia3.math.Ia3Config(), sites={f"site{self.units}": params})
        return packed_adapter.build(adapter, SHAPE, dtype=torch.float32)


class FakeMixture(NamedTuple):
    """The content of a mixture: a router over some adapters, of `units` · 64 bytes."""

    watermark: int
    experts: tuple[FakeAdapter, ...]
    units: int = 1

    @property
    def digest(self) -> AdapterDigest:
        return AdapterDigest(f"{self.watermark:064x}")

    def packed(self) -> PackedAdapter:
        count = len(self.experts)
        hidden = 16 * self.units // count
        config = mixture.MixtureConfig(num_experts=count, top_k=1, shared=True)
        params = mixture.MixtureParams(torch.full((1, count, hidden), float(self.watermark)))
        named = tuple(mixture.Expert(expert.digest) for expert in self.experts)
        return packed_adapter.build_router(mixture.Mixture(config, params, named))


Spans = tuple[tuple[int, float], ...]  # (watermark, log-gate) of each span of a request
Deltas = tuple[tuple[int, float], ...]  # (watermark, gate) of every adapter that acts on a token


def spans_of(uses: Iterable[AdapterUse]) -> Spans:
    """Return a request's virtual positions."""
    return tuple((int(use.digest, 16), float32(math.log(use.gate))) for use in uses if use.num_virtual_tokens)


def deltas_at(uses: Iterable[AdapterUse], index: int) -> Deltas:
    """Return the adapters that act on the real token `index`."""
    return tuple(
        (int(use.digest, 16), use.gate)
        for use in uses
        if not use.num_virtual_tokens and (not use.ranges or any(begin <= index < end for begin, end in use.ranges))
    )


def float32(number: float) -> float:
    """Return the number as the batch holds it."""
    return struct.unpack("f", struct.pack("f", number))[0]


@cache
def start(spans: Spans) -> bytes:
    """Return the hash before the first token."""
    return blake2b(repr(spans).encode(), digest_size=8).digest()


@cache
def advance(digest: bytes, token: int, deltas: Deltas) -> bytes:
    """Return the hash after one more token."""
    return blake2b(digest + token.to_bytes(8, "little") + repr(deltas).encode(), digest_size=8).digest()


@cache
def logits_after(digest: bytes) -> Tensor:
    """Return the logits [V] of the token that follows."""
    noise = blake2b(digest, digest_size=2 * VOCAB_SIZE).digest()
    return torch.frombuffer(bytearray(noise), dtype=torch.uint16).to(torch.float32) / 8192


def expected_tokens(request: Request) -> list[int]:
    """Return the tokens that `request` must get, computed alone and without an engine."""
    shadow = Request(request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, params=request.params)
    params, digest = request.params, start(spans_of(request.adapters))
    for index, token in enumerate(request.prompt_token_ids):
        digest = advance(digest, token, deltas_at(request.adapters, index))
    while len(shadow.output) < params.max_new_tokens:
        if params.temperature == 0 and not params.min_new_tokens and params.repetition_penalty == 1:
            token = int(logits_after(digest).argmax())
        else:
            (sampled,) = sampler.sample(logits_after(digest)[None], [shadow])
            assert sampled is not None
            token = sampled.token_id
        shadow.output.append(token)
        if token in params.stop_token_ids and len(shadow.output) >= params.min_new_tokens:
            break
        digest = advance(digest, token, deltas_at(request.adapters, shadow.num_tokens - 1))
    return shadow.output


class TokenCell(NamedTuple):
    """A real token in a KV slot: the token, the adapters that acted on it, and the hash of everything up to it."""

    token: int
    deltas: Deltas
    digest: bytes


class VirtualCell(NamedTuple):
    """A virtual position of the adapter with this watermark."""

    watermark: int
    position: int


class FakeRunner:
    """A runner whose logits reveal their inputs.

    fail: called with every batch; an error that it raises is the fault of that step. fail_virtual: the same for the
    soft rows of an adapter, after some of their cells were written. poison: tokens after which logits are not finite,
    nor is the KV that the step wrote for that request. violations: faults that no test may ever find.
    alive: whether the device still computes. freed: called when the engine asks for memory.
    """

    def __init__(self, *, block_size: int, capacity_bytes: int = 1 << 20) -> None:
        self.transfer = IN_PLACE
        self.slots = SlotTable(num_sites=len(SHAPE.sites), capacity_bytes=capacity_bytes, device=torch.device("cpu"))
        self.cells: dict[int, TokenCell | VirtualCell] = {}
        self.violations: list[str] = []
        self.steps: list[Step] = []
        self.fail: Callable[[Step], None] = lambda step: None
        self.fail_virtual: Callable[[], None] = lambda: None
        self.poison: Container[int] = ()
        self.alive = True
        self.freed: Callable[[], None] = lambda: None
        self.num_layers = 2
        self._block_size = block_size

    def write_virtual(self, blocks: list[int], virtual: Virtual) -> None:
        is_soft = isinstance(virtual, SoftRows)
        watermarks = virtual.rows[:, 0] if is_soft else virtual.keys[0, :, 0, 0]
        for index, watermark in enumerate(watermarks.tolist()):
            slot = blocks[index // self._block_size] * self._block_size + index % self._block_size
            self.cells[slot] = VirtualCell(int(watermark), index)
            if is_soft:
                self.fail_virtual()

    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.float32).mean()[None]

    def is_alive(self) -> bool:
        return self.alive

    def free_memory(self) -> None:
        self.freed()

    def forward(self, step: Step) -> Tensor:
        self.steps.append(step)
        self.fail(step)
        try:
            last = self._digests(step)
        except AssertionError as error:
            self.violations.append(str(error))
            raise
        self._gates(step)
        logits = torch.stack([logits_after(last[row]) for row in step.sample_rows.tolist()] or [torch.empty(0)])
        for index, row in enumerate(step.sample_rows.tolist()):
            if int(step.input_ids[row]) in self.poison:
                logits[index, index % VOCAB_SIZE] = float("nan")
                b = int(torch.searchsorted(step.paging.query_start, row, right=True)) - 1
                for slot in step.paging.kv_slots[step.paging.query_start[b] : row + 1].tolist():
                    del self.cells[slot]
        return logits

    def _gates(self, step: Step) -> None:
        """Write gates that reveal their place: 1000 · layer + 10 · position + expert."""
        routing = step.routing
        if routing is None or routing.trace is None:
            return
        for run in routing.runs:
            config, _ = self.slots.router(run.slot)
            gates = 10.0 * step.positions[run.first : run.last, None] + torch.arange(config.num_experts)
            for layer, trace in enumerate(routing.trace):
                if run.traced_at >= 0:
                    trace[run.traced_at : run.traced_at + gates.numel()] = (1000 * layer + gates).flatten()

    def _digests(self, step: Step) -> list[bytes]:
        """Return the hash at every row, after writing the row's KV cell."""
        digests: list[bytes] = []
        starts, read_by, written_by = step.paging.query_start.tolist(), {}, {}
        for b, num_real in enumerate(step.paging.context_lens.tolist()):
            rows = range(starts[b], starts[b + 1])
            slots = self._slots(step, b, num_real)
            digest, num_computed = start(self._spans(step, b, rows)), num_real - len(rows)
            for slot in slots[:num_computed]:
                cell = self.cells.get(slot)
                assert isinstance(cell, TokenCell), f"request {b} reads KV slot {slot}, which holds {cell}"
                digest = advance(digest, cell.token, cell.deltas)
                assert cell.digest == digest, f"request {b} reads KV slot {slot} of another beginning"
                read_by.setdefault(slot, b)
            for row, index in zip(rows, range(num_computed, num_real), strict=True):
                slot, token = slots[index], int(step.input_ids[row])
                stored = int(step.paging.kv_slots[row])
                assert slot == stored, f"row {row} is stored at {stored}, read at {slot}"
                position = int(step.paging.virtual_lens[b].sum()) + index
                assert step.positions[row] == position, f"row {row} has position {step.positions[row]}"
                assert slot not in written_by, f"rows of requests {written_by.get(slot)} and {b} share KV slot {slot}"
                written_by[slot] = b
                deltas = self._deltas(step, row)
                digest = advance(digest, token, deltas)
                digests.append(digest)
                self.cells[slot] = TokenCell(token, deltas, digest)
        torn = read_by.keys() & written_by.keys()
        assert not torn, f"KV slots {torn} are read and written in one step"
        return digests

    def _slots(self, step: Step, b: int, num_real: int) -> list[int]:
        size = self._block_size
        num_virtual_blocks = sum(-(-length // size) for length in step.paging.virtual_lens[b].tolist())
        blocks = step.paging.block_tables[b].tolist()[num_virtual_blocks:]
        return [blocks[index // size] * size + index % size for index in range(num_real)]

    def _spans(self, step: Step, b: int, rows: range) -> Spans:
        watermarks, blocks = [], step.paging.block_tables[b].tolist()
        for length in filter(None, step.paging.virtual_lens[b].tolist()):
            found = set()
            for index in range(length):
                cell = self.cells.get(blocks[index // self._block_size] * self._block_size + index % self._block_size)
                assert isinstance(cell, VirtualCell), f"request {b}: virtual position {index} holds {cell}"
                assert cell.position == index, f"request {b}: virtual position {index} holds {cell}"
                found.add(cell.watermark)
            assert len(found) == 1, f"request {b}: virtual positions of several adapters in one span"
            watermarks.append(found.pop())
            blocks = blocks[-(-length // self._block_size) :]
        per_row = {self._log_gates(step, row, len(watermarks)) for row in rows}
        assert len(per_row) == 1, f"request {b}: its rows see its spans with different gates"
        return tuple(zip(watermarks, per_row.pop(), strict=True))

    def _log_gates(self, step: Step, row: int, num_spans: int) -> tuple[float, ...]:
        gates = step.paging.log_gates
        return (0.0,) * num_spans if gates is None else tuple(gates[row, :num_spans].tolist())

    def _deltas(self, step: Step, row: int) -> Deltas:
        if step.entries is None:
            return ()
        begin, end = step.entries.offsets[row : row + 2].tolist()
        slots = step.entries.slots[begin:end].tolist()
        gates = step.entries.gates[begin:end].tolist()
        return tuple((self._watermark(AdapterSlot(slot)), gate) for slot, gate in zip(slots, gates, strict=True))

    def _watermark(self, slot: AdapterSlot) -> int:
        (params,) = self.slots.params(slot).values()
        assert (params.scale == params.scale[0]).all(), f"slot {slot} holds parts of two adapters"
        return int(params.scale[0])


class FakeLoader:
    """A loader whose loads the test completes. asked: the open requests, oldest first. came: counts the requests.

    sizes: of the adapters whose size is known. reserved: what the engine has on its way.
    """

    def __init__(self, capacity_bytes: int = 1 << 30) -> None:
        self.capacity_bytes = capacity_bytes
        self.sizes: dict[AdapterDigest, int] = {}
        self.reserved: Mapping[AdapterDigest, int] = {}
        self.came = Semaphore(0)
        self.asked: list[tuple[AdapterDigest, Future[PackedAdapter]]] = []

    def size_of(self, digest: AdapterDigest) -> int:
        return self.sizes.get(digest, UNIT_BYTES)

    def reserve(self, on_the_way: Mapping[AdapterDigest, int]) -> None:
        self.reserved = on_the_way

    def request(self, digest: AdapterDigest) -> Future[PackedAdapter]:
        packed: Future[PackedAdapter] = Future()
        self.asked.append((digest, packed))
        self.came.release()
        return packed

    def take(self, digest: AdapterDigest) -> Future[PackedAdapter]:
        """Return the oldest open request for an adapter, and close it."""
        index = [asked for asked, _ in self.asked].index(digest)
        return self.asked.pop(index)[1]


class Harness:
    """An engine that runs on the test's thread: the test moves the clock and completes the loads."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 64,
        capacity_bytes: int = 1 << 20,
        host_bytes: int = 1 << 30,
        caching: bool = True,
        metrics: Metrics | None = None,
        stream_interval_s: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.runner = FakeRunner(block_size=block_size, capacity_bytes=capacity_bytes)
        self.inbox = Inbox()
        self.loader = FakeLoader(host_bytes)
        self.failed: list[tuple[AdapterDigest, str]] = []
        self.num_down = 0
        self.events: dict[RequestId, list[TokenEvent]] = {}
        self.requests: dict[RequestId, Request] = {}
        self.on_finish: Callable[[RequestId, Finish], None] = lambda request_id, finish: None
        self._contents: dict[AdapterDigest, FakeAdapter | FakeMixture] = {}
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            enable_prefix_caching=caching,
            stream_interval_s=stream_interval_s,
        )
        self.engine = Engine(
            self.runner,
            config,
            num_kv_blocks=num_blocks,
            max_model_len=max_model_len,
            inbox=self.inbox,
            loader=self.loader,
            publish=self._take,
            metrics=metrics or Metrics(),
            clock=lambda: self.now,
        )

    @property
    def loads(self) -> list[AdapterDigest]:
        """Loads that the engine requested and that are open, oldest first."""
        return [digest for digest, _ in self.loader.asked]

    def _take(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, AdapterFailed):
                self.failed.append((event.digest, event.error.reason))
            if isinstance(event, EngineDown):
                self.num_down += 1
            if not isinstance(event, TokenEvent):
                continue
            told = self.events.setdefault(event.request_id, [])
            if told and told[-1].finish is not None:
                self.runner.violations.append(f"request {event.request_id}: an event after the last one")
            told.append(event)
            if event.finish is not None:
                self.on_finish(event.request_id, event.finish)

    def submit(
        self,
        prompt: Sequence[int],
        *adapters: FakeAdapter,
        params: SamplingParams = GREEDY,
        gates: Sequence[float] = (),
        ranges: Ranges = (),
        salt: str = "",
        deadline_s: float = float("inf"),
        mixture: FakeMixture | None = None,
        wanted: tuple[ExpertBound, ...] = (),
        reads_prompt: bool = False,
        gate_detail: GateDetail = GateDetail.NONE,
    ) -> Request:
        """Submit a request; it takes effect in the next `run_once`. ranges: tokens on which its deltas act.

        A mixture brings its experts.
        """
        adapters = adapters if mixture is None else mixture.experts
        gates = gates or [1.0] * len(adapters)
        uses = tuple(adapter.use(gate, ranges) for adapter, gate in zip(adapters, gates, strict=True))
        mixed = None if mixture is None else MixtureUse(mixture.digest, reads_prompt, wanted, gate_detail)
        if mixture is not None:
            uses = canonical(uses)
            self._contents[mixture.digest] = mixture
        request = Request(
            request_id=RequestId(str(len(self.requests))),
            prompt_token_ids=tuple(prompt),
            params=params,
            adapters=uses,
            mixture=mixed,
            cache_root=block_manager.cache_root(salt, SHAPE.digest, uses, mixed, prompt),
            deadline_s=deadline_s,
            arrival_s=self.now,
        )
        self.requests[request.request_id] = request
        for adapter in adapters:
            self._contents[adapter.digest] = adapter
        self.engine.submit(request)
        return request

    def answer_load(self, digest: AdapterDigest, error: WeftError | None = None) -> None:
        """Complete the oldest load of `digest`."""
        packed = self.loader.take(digest)
        if error is None:
            packed.set_result(self._contents[digest].packed())
        else:
            packed.set_exception(error)

    def know(self, adapter: FakeAdapter) -> None:
        """Allow loads of an adapter that no request has named."""
        self._contents[adapter.digest] = adapter

    def turn(self, count: int = 1) -> None:
        """Run the engine, checking its books after each `run_once`."""
        for _ in range(count):
            self.engine.run_once()
            self.check()

    def run(self, *, answer_loads: bool = True, max_turns: int = 2000) -> None:
        """Run the engine until nothing is left to do."""
        for _ in range(max_turns):
            while answer_loads and self.loads:
                self.answer_load(self.loads[0])
            self.turn()
            if not self.unfinished and not self.loads:
                return
        raise AssertionError(f"still unfinished after {max_turns} turns: {self.unfinished}")

    @property
    def unfinished(self) -> list[RequestId]:
        return [request_id for request_id in self.requests if self.finish(request_id) is None]

    def finish(self, request: Request | RequestId) -> Finish | None:
        """Return the request's terminal event, once it has come."""
        request_id = request.request_id if isinstance(request, Request) else request
        told = self.events.get(request_id)
        return told[-1].finish if told else None

    def tokens(self, request: Request) -> list[int]:
        """Return the request's tokens so far."""
        return [token.token_id for event in self.events.get(request.request_id, ()) for token in event.tokens]

    def reason(self, request: Request) -> str | None:
        """Return why the request ended: the error's reason if there is one."""
        finish = self.finish(request)
        assert finish is not None, f"request {request.request_id} has not ended"
        return finish.reason.value if finish.error is None else finish.error.reason

    def assert_answers(self, *requests: Request) -> None:
        """Check that complete requests got exactly the expected tokens, and the others a beginning of them."""
        for request in requests or self.requests.values():
            wanted, got = expected_tokens(request), self.tokens(request)
            finish = self.finish(request)
            if finish is not None and finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert got == wanted, (request.request_id, got, wanted)
                assert finish.num_completion_tokens == len(got)
            else:
                assert got == wanted[: len(got)], (request.request_id, got, wanted)

    def check(self) -> None:
        """Check the engine's books: every reference has its holder, every holder its reference."""
        assert not self.runner.violations, self.runner.violations
        engine, residency = self.engine, self.engine.residency
        blocks, scheduler = engine.blocks, engine.scheduler
        check_blocks(blocks)
        alive = [*scheduler.waiting, *scheduler.running]
        assert len(set(alive)) == len(alive)
        assert {request.request_id for request in alive} == engine._requests.keys()
        assert not any(request.blocks for request in scheduler.waiting)
        mixed = [request for request in alive if request.mixture is not None]
        assert len(engine._computation.stepper.mixtures.of) <= len(mixed), "gates of requests that are gone"
        residents = residency._resident
        held = Counter(block for request in alive for block in [*request.blocks, *request.virtual_blocks])
        held.update(block for resident in residents.values() for block in resident.blocks)
        assert held == +Counter(dict(enumerate(blocks._references)))
        holders = Counter(g for request in residency.slots_of for g in request.digests)
        assert holders == +Counter({digest: resident.holders for digest, resident in residents.items()})
        assert residency.slots_of.keys() >= set(scheduler.running)
        assert residency.slots_of.keys() | residency._seekers <= set(alive)
        assert not residency._pending & residents.keys()
        assert residency._pending <= set(self.loads) | set(residency.wanted)
        sought = {digest for request in residency._seekers for digest in request.digests}
        wanted = sought | residency._pinned | residency._awaited.keys()
        assert residency._arrived.keys() <= wanted
        slots = self.runner.slots
        assert len(slots) == len(residents)
        assert slots.used_bytes == sum(resident.packed.buffer.nbytes for resident in residents.values())
        assert slots.used_bytes <= slots.capacity_bytes


def check_blocks(blocks: BlockManager) -> None:
    """Check that every block is either free, idle or referenced, and that keys and blocks lead to each other."""
    free, idle = set(blocks._free), set(blocks._idle)
    assert len(free) == len(blocks._free)
    assert not free & idle
    for block, references in enumerate(blocks._references):
        assert (references == 0) == (block in free or block in idle), (block, references)
    assert idle <= set(blocks._key_of)
    assert {key: block for block, key in blocks._key_of.items()} == blocks._block_of
    assert blocks._digests_of.keys() == blocks._key_of.keys()


class Threaded(Harness):
    """The same engine with its own thread; the test completes the loads."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.told = Condition()
        self.engine._clock = time.monotonic
        self.engine.start()

    def _take(self, events: Sequence[EngineEvent]) -> None:
        with self.told:
            super()._take(events)
            self.told.notify_all()

    def wait(self, *requests: Request, timeout_s: float = 20.0) -> None:
        """Wait until these requests have ended; a hang is a failure."""
        with self.told:
            done = self.told.wait_for(lambda: all(map(self.finish, requests)), timeout_s)
        assert done, [request.request_id for request in requests if not self.finish(request)]
