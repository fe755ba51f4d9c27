"""Watches of adapters: each watch delivers a change once, and queues at most one per adapter."""

import asyncio
import contextlib
from collections.abc import Iterator

from weft.adapters.identifiers import AdapterId
from weft.adapters.registry import Change, Version


class Watch:
    """Changes that one caller has not read yet. Their versions are live: they have the state when they are read.

    A later change of an adapter replaces an earlier one. So a slow caller costs no memory: it misses states in between,
    but never the latest.
    """

    def __init__(self, *, is_over: bool) -> None:
        self._changes: dict[AdapterId, tuple[Change, Version]] = {}
        self._is_over = is_over
        self._ready = asyncio.Event()

    def put(self, change: Change, version: Version) -> None:
        """Add a change."""
        earlier = self._changes.pop(version.adapter_id, None)
        if earlier is not None and earlier[0] is Change.ADDED and change is Change.UPDATED:
            change = Change.ADDED
        self._changes[version.adapter_id] = change, version
        self._ready.set()

    def end(self) -> None:
        """End the watch after the changes that are queued now."""
        self._is_over = True
        self._ready.set()

    async def next(self) -> tuple[Change, Version] | None:
        """Return the next change, or None after the last."""
        while not self._changes and not self._is_over:
            self._ready.clear()
            await self._ready.wait()
        return self._changes.pop(next(iter(self._changes))) if self._changes else None


class Watches:
    """The open watches of one server."""

    def __init__(self) -> None:
        self._open: set[Watch] = set()
        self._is_over = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Yield a watch of every change from now on."""
        watch = Watch(is_over=self._is_over)
        self._open.add(watch)
        try:
            yield watch
        finally:
            self._open.discard(watch)

    def put(self, change: Change, version: Version) -> None:
        """Add a change to every open watch."""
        for watch in self._open:
            watch.put(change, version)

    def end(self) -> None:
        """End the open watches, and later ones as they open."""
        self._is_over = True
        for watch in self._open:
            watch.end()
