"""A loader for an engine without a store: packed adapters that are already in memory."""

from collections.abc import Callable
from concurrent.futures import Future

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter


class LoadedAdapters:
    """Answers each request of the engine immediately, with what `packed_of` returns."""

    def __init__(self, packed_of: Callable[[AdapterDigest], PackedAdapter]) -> None:
        self._packed_of = packed_of

    def request(self, digest: AdapterDigest) -> "Future[PackedAdapter]":
        """Return the packed adapter as a finished future."""
        future: Future[PackedAdapter] = Future()
        future.set_result(self._packed_of(digest))
        return future
