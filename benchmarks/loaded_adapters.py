"""A loader for an engine without a store: packed adapters that are already in memory."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter


class LoadedAdapters:
    """Answers each request of the engine immediately, with what `packed_of` returns; host memory has no bound."""

    capacity_bytes = sys.maxsize

    def __init__(self, packed_of: Callable[[AdapterDigest], PackedAdapter]) -> None:
        self._packed_of = packed_of

    def size_of(self, digest: AdapterDigest) -> int:
        return 0

    def reserve(self, on_the_way: Mapping[AdapterDigest, int]) -> None:
        """Reserve nothing, since there is no bound."""

    def request(self, digest: AdapterDigest) -> "Future[PackedAdapter]":
        """Return the packed adapter as a finished future."""
        future: Future[PackedAdapter] = Future()
        future.set_result(self._packed_of(digest))
        return future
