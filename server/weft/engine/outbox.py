"""Events that the engine publishes: those of requests at intervals, those of adapters and of itself at once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from weft.adapters.identifiers import AdapterDigest
from weft.engine.request import RequestId, TokenEvent
from weft.errors import Unavailable, WeftError


class AdaptersResident(NamedTuple):
    """The adapters on the device; published after every change and before any event that depends on it."""

    digests: frozenset[AdapterDigest]


class AdapterFailed(NamedTuple):
    """An adapter could not be loaded, or the base could not compute its virtual positions."""

    digest: AdapterDigest
    error: WeftError


class EngineDown(NamedTuple):
    """The engine was stopped by a fault that it could not contain. It accepts no more requests."""

    error: Unavailable


EngineEvent: TypeAlias = TokenEvent | AdaptersResident | AdapterFailed | EngineDown
Publish: TypeAlias = Callable[[Sequence[EngineEvent]], object]


class Outbox:
    """Collects events on the engine thread and passes them to `publish`, which must return at once.

    stream_interval_s: time between two deliveries of tokens; each delivery costs the event loop time.
    """

    def __init__(self, publish: Publish, stream_interval_s: float) -> None:
        self._publish = publish
        self._stream_interval_s = stream_interval_s
        self._pending: dict[RequestId, TokenEvent] = {}  # those of a request merged into one
        self._due_s = 0.0

    def put(self, event: TokenEvent, *, at_once: bool) -> None:
        """Add a request's event to the next delivery; at_once: deliver right after this step."""
        before = self._pending.get(event.request_id)
        self._pending[event.request_id] = event if before is None else event.after(before)
        if at_once:
            self._due_s = 0.0

    def deliver_due(self, now: float) -> None:
        """Deliver the events of requests if the interval has passed."""
        if now >= self._due_s:
            self.deliver(now)

    def deliver(self, now: float) -> None:
        """Deliver the events of requests; `now` is on the engine's clock."""
        self._due_s = now + self._stream_interval_s
        if self._pending:
            events, self._pending = self._pending, {}
            self._publish(list(events.values()))

    def publish(self, event: AdaptersResident | AdapterFailed | EngineDown) -> None:
        """Publish an event of an adapter or of the engine at once."""
        self._publish([event])
