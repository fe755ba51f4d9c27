"""Queue of uploads: a few are received at a time, a bounded number waits, and further ones are refused.

Nothing is read from a waiting upload, so gRPC's flow control holds its bytes back at the client.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from weft.errors import Overloaded


class UploadLine:
    """Places for uploads, given in order of arrival; used on one event loop."""

    def __init__(self, *, uploads_max: int, waiting_max: int) -> None:
        self._uploads_max = uploads_max
        self._waiting_max = waiting_max
        self._places = asyncio.Semaphore(uploads_max)
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place and hold it inside the block. Raises Overloaded if the queue is full."""
        if self._places.locked() and self._num_waiting >= self._waiting_max:
            raise Overloaded(
                "UPLOADS_FULL",
                f"uploads: too many at a time and in line for it (limit {self._uploads_max} and {self._waiting_max})",
                metadata={"quota": "uploads", "limit": self._uploads_max + self._waiting_max},
                retry_after_s=1.0,
            )
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._places.release()
