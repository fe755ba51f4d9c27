"""Host memory between disk and device: an LRU cache of packed adapters."""

from collections import OrderedDict

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter


class HostCache:
    """At most `capacity_bytes` of packed adapters. A larger one is not kept. AdapterLoader's lock guards it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._packed_adapters: OrderedDict[AdapterDigest, PackedAdapter] = OrderedDict()

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._packed_adapters

    def get(self, digest: AdapterDigest) -> PackedAdapter | None:
        """Return the packed adapter, now the most recently used one, or None."""
        packed = self._packed_adapters.get(digest)
        if packed is not None:
            self._packed_adapters.move_to_end(digest)
        return packed

    def put(self, digest: AdapterDigest, packed: PackedAdapter) -> None:
        """Keep a packed adapter, evicting older ones as needed."""
        self.drop(digest)
        if packed.size_bytes > self._capacity_bytes:
            return
        self._packed_adapters[digest] = packed
        self.used_bytes += packed.size_bytes
        while self.used_bytes > self._capacity_bytes:
            self.drop(next(iter(self._packed_adapters)))

    def drop(self, digest: AdapterDigest) -> int:
        """Drop a packed adapter; return its bytes."""
        packed = self._packed_adapters.pop(digest, None)
        freed = 0 if packed is None else packed.size_bytes
        self.used_bytes -= freed
        return freed
