"""Queue of an accepted request's events, from the engine to its caller; used on the event loop."""

import asyncio
from collections import deque

from weft.api.admission import Admitted
from weft.engine.request import TokenEvent


class Stream:
    """Events that the caller has not read. is_stalled: whether there were too many of them."""

    __slots__ = ("_reader", "admitted", "events", "is_stalled")

    def __init__(self, admitted: Admitted) -> None:
        self.admitted = admitted
        self.events: deque[TokenEvent] = deque()
        self.is_stalled = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        """Add an event and wake the reader."""
        self.events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> TokenEvent:
        """Wait for an event; return all that have arrived, merged into one."""
        while not self.events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = self.events.popleft()
        while self.events:
            event = self.events.popleft().after(event)
        return event
