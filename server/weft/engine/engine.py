"""The engine: one thread, one `step()`.

Other threads put messages into the inbox; they take effect between two steps, so nothing here needs a lock. Only this
thread touches device memory. Every accepted request ends in exactly one event with `finish`. An engine that does not
run any more refuses every message that wants an answer, and forgets the others.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from weft.adapters.identifiers import Generation
from weft.adapters.slab import Slab
from weft.config import EngineConfig
from weft.engine import sampler
from weft.engine.block_manager import BlockManager
from weft.engine.observer import Observer
from weft.engine.request import FinishReason, Request, RequestId, SampledToken, TokenEvent
from weft.engine.residency import Residency
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled, Scheduler
from weft.engine.stepper import Stepper
from weft.errors import AdapterUnusable, DeadlineExceeded, Overloaded, Unavailable, WeftError
from weft.kernels.faults import is_fatal
from weft.metrics import Metrics

_log = logging.getLogger(__name__)

_GATHER_S = 0.001  # quiet for so long, nobody else is coming
_GATHER_S_MAX = 0.005

ENGINE_DOWN = "ENGINE_DOWN"
T = TypeVar("T")


def draining() -> Unavailable:
    """What everything that comes too late is answered."""
    return Unavailable("DRAINING", "the server is shutting down", retry_after_s=1.0)


class Freed(NamedTuple):
    """What taking an adapter out gave back."""

    device_bytes: int
    kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCallbacks:
    """How the engine talks back. All are called on the engine thread and must only hand over.

    events: the events of one step. load: bring this adapter (answer with `loaded` or `load_failed`).
    resident: which adapters are on the device, after every change and before anything else tells of it.
    unfit: the base cannot compute this adapter's virtual positions; it is of no use until something changes.
    down: the engine stopped by a fault it could not contain; no request is accepted any more.
    """

    events: Callable[[list[TokenEvent]], None]
    load: Callable[[Generation], None]
    resident: Callable[[frozenset[Generation]], None] = lambda generations: None
    unfit: Callable[[Generation, WeftError], None] = lambda generation, error: None
    down: Callable[[], None] = lambda: None


class _Message(NamedTuple):
    """What another thread wants; `refuse` is its answer from an engine that does not run any more."""

    apply: Callable[[], object]
    refuse: Callable[[WeftError], object] = lambda error: None


class Engine:
    """Continuous batching over a runner."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        num_kv_blocks: int,
        max_model_len: int,
        callbacks: EngineCallbacks,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._max_model_len = max_model_len
        self._callbacks = callbacks
        self._observer = Observer(metrics)
        self._clock = clock
        self.blocks = BlockManager(num_kv_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.residency = Residency(
            runner, self.blocks, request_load=callbacks.load, placed=self._adapter_placed, left=self._adapter_left
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            admit=self.residency.admit,
            is_loading=self.residency.is_loading,
        )
        self._stepper = Stepper(runner, self.blocks.block_size)
        self._requests: dict[RequestId, Request] = {}
        self._events: dict[RequestId, TokenEvent] = {}  # what was not handed over yet, of each request in one piece
        self._stream_interval_s = config.stream_interval_s
        self._hand_over_s = 0.0  # when events are next handed over
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._stopping = False
        self._down: Unavailable | None = None
        self._thread = threading.Thread(target=self._run, name="weft-engine", daemon=True)
        self._ended = threading.Event()
        self._after_end = threading.Lock()

    # -- called from any thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread; requests still inside end with UNAVAILABLE. Waits up to `timeout_s`."""
        self._post(self._stop)
        if self._thread.ident is None:
            self._run()  # never started: the caller answers those who wait
        else:
            self._thread.join(timeout_s)

    def submit(self, request: Request) -> None:
        """Take a request in."""
        self._post(partial(self._add, request), refuse=partial(self._tell, request, FinishReason.ERROR))

    def end(self, request_id: RequestId, reason: FinishReason, error: WeftError | None = None) -> None:
        """End a request before its own end; nothing happens when it has ended already."""
        self._post(partial(self._end_by_id, request_id, reason, error))

    def loaded(self, generation: Generation, slab: Slab) -> None:
        """The answer to `callbacks.load`."""
        self._post(partial(self.residency.arrived, generation, slab))

    def load_failed(self, generation: Generation, error: WeftError) -> None:
        """The other answer: every request that waits for this adapter ends with `error`."""
        self._post(partial(self._load_failed, generation, error))

    def evict(self, generation: Generation) -> "Future[Freed | None]":
        """Take an adapter, its pin and its cached KV off the device; None where a request holds it."""
        return self.call(partial(self._evict, generation))

    def preload(self, generation: Generation) -> "Future[None]":
        """Bring an adapter in ahead of its requests; ends with what its load failed with, or POOL_EXHAUSTED."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # who waits for it may go, and leave the others waiting
        self._post(partial(self.residency.preload, generation, future), refuse=future.set_exception)
        return future

    def pin(self, generation: Generation) -> None:
        """Keep an adapter on the device."""
        self._post(partial(self.residency.pin, generation))

    def unpin(self, generation: Generation) -> None:
        """Let an adapter leave the device."""
        self._post(partial(self.residency.unpin, generation))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the engine thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the caller has gone
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        def refuse(error: WeftError) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self._post(run, refuse=refuse)
        return future

    # -- the engine thread --------------------------------------------------------------------------------------

    def turn(self, *, wait: bool = False) -> None:
        """Messages in, a step, events out: the engine thread does nothing else. A test may be that thread."""
        try:
            self._receive(wait=wait)
            self.step()
            if self._clock() >= self._hand_over_s:
                self._deliver()
        except Exception:
            _log.exception("engine: a fault outside the model call; the engine goes down")
            self._go_down()
            self._deliver()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn(wait=True)
        finally:
            self._fail_all(self._down or draining())
            self._down = self._down or Unavailable(ENGINE_DOWN, "the engine has stopped", retry_after_s=1.0)
            self._ended.set()
            self._answer_after_end()

    def _post(self, apply: Callable[[], object], refuse: Callable[[WeftError], object] = lambda error: None) -> None:
        """Put a message in; after the thread has ended its sender answers it, so that nothing waits for ever."""
        self._inbox.put(_Message(apply, refuse))
        if self._ended.is_set():
            self._answer_after_end()

    def _answer_after_end(self) -> None:
        with self._after_end:
            self._receive(wait=False)
            self._deliver()

    def step(self) -> None:
        """Schedule, compute, sample, hand out. A fault of the model call ends the requests of this step only."""
        now = self._clock()
        self._expire(now)
        step = self.scheduler.schedule()
        blocked = self.scheduler.blocked
        if blocked is not None and not self.residency.can_fit(blocked):
            self._end_without_room(blocked)
        self._end_unfit()
        if not step:
            self._resolve_stall()
            self._observer.queue(self.scheduler)
            return
        try:
            sampled = self._compute(step)
        except Exception as error:
            _log.exception("engine: a step failed; its %d requests end", len(step))
            if is_fatal(error):
                self._go_down()
                return
            for request, _ in step:
                self._end(request, FinishReason.ERROR, WeftError("STEP_FAILED", "the model step failed"))
            return
        self.scheduler.advance(step)
        done = self._clock()
        for request, token in sampled:
            self._append(request, token, done)
        self._observer.step(step, self.scheduler, seconds=done - now, now=done)

    def _compute(self, step: list[Scheduled]) -> list[tuple[Request, SampledToken | None]]:
        logits = self._stepper.compute(step, self.residency.slots_of)
        requests = [scheduled.request for scheduled in step if scheduled.samples]
        if not requests:
            return []
        return list(zip(requests, sampler.sample(logits, requests, self._runner.transfer), strict=True))

    def _append(self, request: Request, token: SampledToken | None, now: float) -> None:
        if token is None:
            self._observer.row_not_finite()
            self.blocks.distrust(request)
            self._end(request, FinishReason.ERROR, _non_finite(request))
            return
        request.output.append(token.token_id)
        self._observer.token(request, now)
        request.last_token_s = now
        reason = self._finish_reason(request, token.token_id)
        if reason is None:
            self._put(TokenEvent(request.request_id, (token,)), at_once=len(request.output) == 1)
        else:
            self._end(request, reason, tokens=(token,))

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in params.stop_token_ids and len(request.output) >= params.min_new_tokens:
            return FinishReason.STOP
        if len(request.output) >= params.max_new_tokens:
            return FinishReason.LENGTH
        if request.num_virtual_tokens + request.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        error: WeftError | None = None,
        tokens: tuple[SampledToken, ...] = (),
    ) -> None:
        """The one way a request leaves while the engine runs."""
        self._tell(request, reason, error, tokens)
        self.scheduler.remove(request)
        self.residency.release(request)

    def _tell(
        self,
        request: Request,
        reason: FinishReason,
        error: WeftError | None = None,
        tokens: tuple[SampledToken, ...] = (),
    ) -> None:
        """The request's last event."""
        finish = request.finish(reason, error)
        if request.mixture is not None:
            finish = replace(finish, gates=self._stepper.mixtures.end(request))
        self._requests.pop(request.request_id, None)
        self._put(TokenEvent(request.request_id, tokens, finish), at_once=True)
        self._observer.request_ended(request, finish, self._clock())

    def _expire(self, now: float) -> None:
        expired = [request for request in self._requests.values() if request.deadline_s <= now]
        for request in expired:
            error = DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the request ended")
            self._end(request, FinishReason.ERROR, error)

    def _resolve_stall(self) -> None:
        """Nothing runs. The first request that waits for room, not for a load, gets all there is for the next step."""
        stuck = self._stuck()
        if stuck is None:
            return
        others = [request for request in self.scheduler.waiting if request is not stuck]
        if self.residency.release_all(others) or self.residency.evict_virtual():
            return
        self._end_without_room(stuck)

    def _end_without_room(self, request: Request) -> None:
        error = Overloaded(
            "POOL_EXHAUSTED",
            "the adapter and KV pools have no room for this request now",
            metadata={"quota": "adapter_and_kv_pools"},
            retry_after_s=1.0,
        )
        self._end(request, FinishReason.ERROR, error)

    def _stuck(self) -> Request | None:
        waiting = (request for request in self.scheduler.waiting if not self.residency.is_loading(request))
        return next(waiting, None)

    # -- messages -----------------------------------------------------------------------------------------------

    def _receive(self, *, wait: bool) -> None:
        """Take every message in; where nothing can run, sleep until the next one or the nearest deadline.

        A request that wakes the engine waits a moment for others: what comes together is computed together.
        """
        gather_until = 0.0
        if wait and not self.scheduler.running and self._stuck() is None and self._down is None:
            self._deliver()  # of requests that lost their place
            self._take(self._sleep_s())
            gather_until = self._clock() + _GATHER_S_MAX
        while self._take(_GATHER_S if self._clock() < gather_until and self._can_start() else 0.0):
            pass

    def _can_start(self) -> bool:
        """Whether somebody waits, and nobody for a load."""
        waiting = self.scheduler.waiting
        return bool(waiting) and not any(map(self.residency.is_loading, waiting))

    def _take(self, timeout_s: float | None) -> bool:
        """Take one message in, if one comes within so many seconds; None waits for ever."""
        try:
            message = self._inbox.get(timeout_s != 0.0, timeout=timeout_s)
        except queue.Empty:
            return False
        if self._down is None:
            message.apply()
        else:
            message.refuse(self._down)
        return True

    def _sleep_s(self) -> float | None:
        nearest = min((request.deadline_s for request in self._requests.values()), default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - self._clock())

    def _add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self.residency.foresee(request)

    def _end_by_id(self, request_id: RequestId, reason: FinishReason, error: WeftError | None) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, reason, error)

    def _load_failed(self, generation: Generation, error: WeftError) -> None:
        self.residency.failed(generation, error)
        self._end_waiting_for(generation, error)

    def _end_unfit(self) -> None:
        """End those who wait for adapters whose virtual positions could not be computed."""
        for generation, error in self.residency.take_failures().items():
            self._callbacks.unfit(generation, error)
            self._end_waiting_for(generation, error)

    def _end_waiting_for(self, generation: Generation, error: WeftError) -> None:
        self._observer.load_failed()
        for request in list(self.scheduler.waiting):
            if generation in request.generations:
                self._end(request, FinishReason.ERROR, error)

    def _evict(self, generation: Generation) -> Freed | None:
        device_bytes = self.residency.evict(generation)
        return None if device_bytes is None else Freed(device_bytes, self.blocks.purge(generation))

    def _stop(self) -> None:
        self._stopping = True

    def _go_down(self) -> None:
        self._down = Unavailable(
            ENGINE_DOWN, "the engine stopped by a fault; another replica can answer", retry_after_s=5.0
        )
        self._fail_all(self._down)
        self._stopping = True
        self._callbacks.down()

    def _fail_all(self, error: WeftError) -> None:
        """Tell everyone, and touch no accounting: it may be what broke, and nothing runs after this."""
        self.residency.abandon(error)
        for request in list(self._requests.values()):
            self._tell(request, FinishReason.ERROR, error)

    def _put(self, event: TokenEvent, *, at_once: bool) -> None:
        """Hand an event over with the next ones; at once: after this step."""
        before = self._events.get(event.request_id)
        self._events[event.request_id] = event if before is None else event.after(before)
        if at_once:
            self._hand_over_s = 0.0

    def _deliver(self) -> None:
        self._hand_over_s = self._clock() + self._stream_interval_s
        if self._events:
            events, self._events = self._events, {}
            self._callbacks.events(list(events.values()))

    def _adapter_placed(self, slab: Slab) -> None:
        self._observer.adapter_placed(slab)
        self._callbacks.resident(self.residency.resident())

    def _adapter_left(self, slab: Slab, for_room: bool) -> None:
        self._observer.adapter_left(slab, for_room=for_room)
        self._callbacks.resident(self.residency.resident())


def _non_finite(request: Request) -> WeftError:
    if request.adapters:
        made_by = "the adapter" if len(request.adapters) == 1 else "the adapters together"
        return AdapterUnusable("ADAPTER_NON_FINITE", f"{made_by} made numbers that are not finite for this request")
    return WeftError("NON_FINITE", "the base made numbers that are not finite for this request")
