"""The engine: one thread, one `step()`.

Other threads put messages into its inbox. Messages take effect between two steps, so nothing here needs a lock. Only
this thread touches device memory. Every accepted request ends in exactly one event with `finish`. Once the engine has
stopped, it refuses every message that expects an answer, and drops the others. Whoever finds that the thread hangs
abandons the engine (`abandon`), and ends its requests in its place.
"""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.loader import AdapterLoader
from weft.adapters.packed_adapter import PackedAdapter
from weft.config import EngineConfig
from weft.engine import endings
from weft.engine.block_manager import BlockManager
from weft.engine.computation import Abandoned, Computation, Failed
from weft.engine.inbox import Inbox
from weft.engine.observer import Observer
from weft.engine.outbox import AdapterFailed, EngineDown, Outbox, Publish
from weft.engine.request import (
    FinishReason,
    Request,
    RequestId,
    RequestStatus,
    SampledToken,
    TokenEvent,
    Tokens,
)
from weft.engine.residency import Residency
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled, Scheduler
from weft.errors import DeadlineExceeded, Unavailable, WeftError, draining_error
from weft.metrics import Metrics

_log = logging.getLogger(__name__)

_GATHER_S = 0.001  # after this long without a message, no other is expected
_GATHER_S_MAX = 0.005


class Freed(NamedTuple):
    """Memory that removing an adapter freed. host_bytes: of the copy in host memory, which the engine does not own."""

    device_bytes: int = 0
    host_bytes: int = 0
    kv_blocks: int = 0


class Engine:
    """Continuous batching over a runner.

    inbox: messages from other threads. publish: takes the engine's events, on the engine thread.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        num_kv_blocks: int,
        max_model_len: int,
        inbox: Inbox,
        loader: AdapterLoader,
        publish: Publish,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._max_model_len = max_model_len
        self._loader = loader
        self._clock = clock
        self._observer = Observer(metrics)
        self._inbox = inbox
        self._outbox = Outbox(publish, config.stream_interval_s)
        self.blocks = BlockManager(num_kv_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.residency = Residency(runner, self.blocks, self._observer, self._outbox, loader)
        self.scheduler = Scheduler(
            self.blocks,
            self.residency,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._computation = Computation(runner, self.blocks, self.residency.slots_of, self.residency.evict_idle)
        self._requests: dict[RequestId, Request] = {}
        self._stopping = False
        self._has_ended = threading.Event()
        self._num_messages = 0
        self._thread = threading.Thread(target=self._run, name="weft-engine", daemon=True)

    # -- called from any thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Stop the thread; return whether it has ended within `timeout_s`, or is abandoned.

        Requests that have not ended end with UNAVAILABLE.
        """
        self._inbox.post(self._stop)
        if self._thread.ident is None:
            self._run()  # never started: the caller's thread answers the messages
        return self._has_ended.wait(timeout_s)

    def abandon(self, error: Unavailable) -> None:
        """Answer all messages with `error` from now on, because the thread hangs.

        Its requests are left as they are: the caller ends them, and ignores the events of a thread that wakes up late.
        """
        self._computation.is_abandoned = self._stopping = True
        self._inbox.abandon(error)
        self._has_ended.set()

    @property
    def progress(self) -> int:
        """A number that changes whenever the thread begins a step or has ended a message or an adapter's placement."""
        return self._computation.num_begun + self._num_messages + self.residency.num_placed

    def probe(self) -> "Future[None]":
        """Return a future that ends when the thread comes round."""
        return self._inbox.call(lambda: None)

    def where(self) -> str:
        """Return the stack of the thread, for a log."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "it has ended"

    def submit(self, request: Request) -> None:
        self._inbox.post(partial(self._add, request), partial(self._refuse, request))

    def end(self, request_id: RequestId, reason: FinishReason, error: WeftError | None = None) -> None:
        """End a request early; do nothing if it has ended already."""
        self._inbox.post(partial(self._end_by_id, request_id, reason, error))

    def evict(self, digest: AdapterDigest) -> "Future[Freed | None]":
        """Remove an adapter, its pin and its cached KV from the device; None if a request holds it."""
        return self._inbox.call(partial(self._evict, digest))

    def preload(
        self, digest: AdapterDigest, *, packed: PackedAdapter | None = None, pin: bool = False
    ) -> "Future[None]":
        """Bring an adapter to the device ahead of its requests.

        packed: the adapter, if it is loaded already. pin: keep it on the device.
        The future fails with the error of the load, or with POOL_EXHAUSTED.
        """
        future: Future[None] = self._inbox.awaited(Future())
        future.set_running_or_notify_cancel()  # one caller may give up while others await the same adapter
        self._inbox.post(partial(self.residency.preload, digest, future, packed=packed, pin=pin), future.set_exception)
        return future

    def unpin(self, digest: AdapterDigest) -> None:
        """Let an adapter leave the device."""
        self._inbox.post(partial(self.residency.unpin, digest))

    # -- the engine thread --------------------------------------------------------------------------------------

    def run_once(self, *, wait: bool = False) -> None:
        """Receive messages, step, deliver events: all that the engine thread does. Tests may call it instead."""
        try:
            self._receive(wait=wait)
            self.step()
            self._outbox.deliver_due(self._clock())
        except Exception:
            if self._computation.is_abandoned:
                return
            _log.exception("engine: a fault outside the model call; the engine goes down")
            self._go_down()
            self._outbox.deliver(self._clock())

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.run_once(wait=True)
        finally:
            if not self._computation.is_abandoned:
                self._fail_all(self._inbox.refusal or draining_error())
                self._inbox.close(endings.engine_down("it has stopped"))
                self._outbox.deliver(self._clock())
            self._has_ended.set()

    def step(self) -> None:
        """Schedule, compute, sample, publish. A fault in the model call ends only the requests that raise alone."""
        now = self._clock()
        self._expire(now)
        step = self.scheduler.schedule()
        for digest in self.residency.take_wanted():
            self._request_load(digest)
        blocked = self.scheduler.blocked
        if blocked is not None and not self.residency.can_fit(blocked):
            self._end_without_room(blocked)
        for digest, error in self.residency.take_failures().items():
            self._fail_adapter(digest, error)
        if not step:
            self._resolve_stall()
            self._observer.queue(self.scheduler)
            return
        for failed in sorted(self._compute(step, now), key=lambda failed: failed.is_short_of_memory):
            if failed.scheduled.request.status is not RequestStatus.RUNNING:
                continue  # it was preempted for one before it, or the engine has gone down
            if failed.is_short_of_memory:
                self._make_way(failed.scheduled)
            else:
                self._end_failed(failed)

    def _compute(self, step: Sequence[Scheduled], now: float) -> list[Failed]:
        """Compute a step, and publish its tokens; return what raises alone. Goes down if the device is lost."""
        try:
            computed = self._computation.compute(step)
        except Abandoned:
            return []
        except Exception:
            _log.exception("engine: the device is lost; the engine goes down")
            self._go_down()
            return []
        self.scheduler.advance(computed.parts)
        done = self._clock()
        for request, token in computed.sampled:
            self._append(request, token, done)
        if computed.parts:
            self._observer.step(computed.parts, self.scheduler, seconds=done - now, now=done)
        return computed.failed

    def _make_way(self, scheduled: Scheduled) -> None:
        """Try a request that ran out of device memory alone once more, after all others have let go of theirs."""
        request = scheduled.request
        self.scheduler.preempt_others(request)
        self.residency.release_all(list(self.scheduler.waiting))
        for failed in self._compute([scheduled], self._clock()):
            self._end_failed(failed)

    def _end_failed(self, failed: Failed) -> None:
        """End a request that raises alone."""
        self._end(failed.scheduled.request, FinishReason.ERROR, endings.step_failed(failed))
        if not self._computation.can_go_on(1):
            self._go_down(endings.engine_down("every step fails"))

    def _append(self, request: Request, token: SampledToken | None, now: float) -> None:
        if token is None:
            self._observer.row_not_finite(request)
            self.blocks.invalidate(request)
            self._end(request, FinishReason.ERROR, endings.non_finite(request))
            return
        request.output.append(token.token_id)
        self._observer.token(request, now)
        request.last_token_s = now
        reason = self._finish_reason(request, token.token_id)
        if reason is None:
            self._outbox.put(TokenEvent(request.request_id, (token,)), at_once=len(request.output) == 1)
        else:
            self._end(request, reason, tokens=(token,))

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in params.stop_token_ids and len(request.output) >= params.min_new_tokens:
            return FinishReason.STOP
        is_full = request.num_virtual_tokens + request.num_tokens >= self._max_model_len
        return FinishReason.LENGTH if is_full or len(request.output) >= params.max_new_tokens else None

    def _end(self, request: Request, reason: FinishReason, error: WeftError | None = None, tokens: Tokens = ()) -> None:
        """End a request. While the engine runs, every request leaves through here."""
        self._put_finish(request, reason, error, tokens)
        self.scheduler.remove(request)
        self.residency.release(request)

    def _put_finish(
        self, request: Request, reason: FinishReason, error: WeftError | None = None, tokens: Tokens = ()
    ) -> None:
        """Put the request's last event into the outbox."""
        finish = request.finish(reason, error)
        if request.mixture is not None:
            finish = replace(finish, gates=self._computation.stepper.mixtures.end(request))
        self._requests.pop(request.request_id, None)
        self._outbox.put(TokenEvent(request.request_id, tokens, finish), at_once=True)
        self._observer.request_ended(request, finish, self._clock())

    def _expire(self, now: float) -> None:
        for request in [request for request in self._requests.values() if request.deadline_s <= now]:
            error = DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the request ended")
            self._end(request, FinishReason.ERROR, error)

    def _resolve_stall(self) -> None:
        """Make room for the first request that waits for room rather than for a load. Called if nothing runs."""
        stuck = self._stuck()
        if stuck is None:
            return
        others = [request for request in self.scheduler.waiting if request is not stuck]
        if not (self.residency.release_all(others) or self.residency.evict_virtual()):
            self._end_without_room(stuck)

    def _end_without_room(self, request: Request) -> None:
        self._end(request, FinishReason.ERROR, endings.without_room())

    def _stuck(self) -> Request | None:
        return next((request for request in self.scheduler.waiting if not self.residency.is_loading(request)), None)

    # -- loads --------------------------------------------------------------------------------------------------

    def _request_load(self, digest: AdapterDigest) -> None:
        loading = self._loader.request(digest)  # done on a thread of the loader
        loading.add_done_callback(lambda packed: self._inbox.post(partial(self._take_load, digest, packed)))

    def _take_load(self, digest: AdapterDigest, packed: "Future[PackedAdapter]") -> None:
        error = packed.exception()
        if error is None:
            self.residency.arrived(digest, packed.result())
        else:
            assert isinstance(error, WeftError), error
            self._fail_adapter(digest, error)
            self.residency.failed(digest, error)

    def _fail_adapter(self, digest: AdapterDigest, error: WeftError) -> None:
        """Publish that an adapter cannot be loaded or placed, and end the requests that wait for it."""
        self._outbox.publish(AdapterFailed(digest, error))
        self._observer.load_failed()
        for request in list(self.scheduler.waiting):
            if digest in request.digests:
                self._end(request, FinishReason.ERROR, error)

    # -- messages -----------------------------------------------------------------------------------------------

    def _receive(self, *, wait: bool) -> None:
        """Handle every message; if nothing can run, sleep until the next message or the nearest deadline.

        A request that wakes the engine waits a moment for others, so that requests that arrive together share a step.
        """
        take, gather_until = self._inbox.take, 0.0
        if wait and not self.scheduler.running and self._stuck() is None and self._inbox.refusal is None:
            self._outbox.deliver(self._clock())  # events of requests that were preempted
            take(self._sleep_s())
            gather_until = self._clock() + _GATHER_S_MAX
        while take(_GATHER_S if self._clock() < gather_until and self._can_start() else 0.0):
            self._num_messages += 1

    def _can_start(self) -> bool:
        """Return whether requests wait, and none of them for a load."""
        waiting = self.scheduler.waiting
        return bool(waiting) and not any(map(self.residency.is_loading, waiting))

    def _sleep_s(self) -> float | None:
        nearest = min((request.deadline_s for request in self._requests.values()), default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - self._clock())

    def _add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self.residency.prefetch(request)

    def _refuse(self, request: Request, error: WeftError) -> None:
        if self._computation.is_abandoned:
            return
        self._put_finish(request, FinishReason.ERROR, error)
        self._outbox.deliver(self._clock())

    def _end_by_id(self, request_id: RequestId, reason: FinishReason, error: WeftError | None) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, reason, error)

    def _evict(self, digest: AdapterDigest) -> Freed | None:
        device_bytes = self.residency.evict(digest)
        return None if device_bytes is None else Freed(device_bytes, kv_blocks=self.blocks.purge(digest))

    def _stop(self) -> None:
        self._stopping = True

    def _go_down(self, down: Unavailable | None = None) -> None:
        down = down or endings.engine_down("it stopped by a fault")
        self._inbox.refusal = down
        self._fail_all(down)
        self._stopping = True
        self._outbox.publish(EngineDown(down))

    def _fail_all(self, error: WeftError) -> None:
        """End every request without touching the accounting: it may be what broke, and nothing runs after this."""
        self.residency.fail_all(error)
        for request in list(self._requests.values()):
            self._put_finish(request, FinishReason.ERROR, error)
