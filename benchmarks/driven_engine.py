"""An engine without a server, driven by the caller's thread: the core of every benchmark of the engine."""

import time
from collections.abc import Callable, Sequence

from benchmarks.loaded_adapters import LoadedAdapters
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter
from weft.config import EngineConfig
from weft.engine.engine import Engine
from weft.engine.inbox import Inbox
from weft.engine.outbox import EngineEvent
from weft.engine.request import TokenEvent
from weft.engine.runner import ModelRunner
from weft.metrics import Metrics


class DrivenEngine(Engine):
    """An engine that gets each adapter from `packed_of` immediately, and keeps its events until they are read."""

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        num_kv_blocks: int,
        max_model_len: int,
        packed_of: Callable[[AdapterDigest], PackedAdapter],
    ) -> None:
        self._timed_events: list[tuple[float, TokenEvent]] = []
        super().__init__(
            runner,
            config,
            num_kv_blocks=num_kv_blocks,
            max_model_len=max_model_len,
            inbox=Inbox(),
            loader=LoadedAdapters(packed_of),
            publish=self._keep,
            metrics=Metrics(),
        )

    def _keep(self, events: Sequence[EngineEvent]) -> None:
        now_s = time.monotonic()
        self._timed_events += [(now_s, event) for event in events if isinstance(event, TokenEvent)]

    def drive(self) -> list[tuple[float, TokenEvent]]:
        """Run one step; return new events with their times on the monotonic clock. Raises a request's error."""
        self.run_once()
        events, self._timed_events = self._timed_events, []
        for _, event in events:
            if event.finish is not None and event.finish.error is not None:
                raise event.finish.error
        return events
