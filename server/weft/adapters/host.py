"""Host memory between disk and device: a thread-safe LRU cache of adapters' slabs."""

import threading
from collections import OrderedDict

from weft.adapters.identifiers import Generation
from weft.adapters.slab import Slab


class HostCache:
    """At most `capacity_bytes` of slabs. A slab larger than that is not kept."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._slabs: OrderedDict[Generation, Slab] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, generation: Generation) -> bool:
        with self._lock:
            return generation in self._slabs

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, generation: Generation) -> Slab | None:
        """Return the slab, now the most recently used one, or None."""
        with self._lock:
            slab = self._slabs.get(generation)
            if slab is not None:
                self._slabs.move_to_end(generation)
            return slab

    def put(self, generation: Generation, slab: Slab) -> None:
        """Keep a slab, evicting older ones as needed."""
        with self._lock:
            self._drop(generation)
            if slab.size_bytes > self._capacity_bytes:
                return
            self._slabs[generation] = slab
            self._used_bytes += slab.size_bytes
            while self._used_bytes > self._capacity_bytes:
                self._drop(next(iter(self._slabs)))

    def drop(self, generation: Generation) -> int:
        """Drop a slab; return its bytes."""
        with self._lock:
            return self._drop(generation)

    def _drop(self, generation: Generation) -> int:
        slab = self._slabs.pop(generation, None)
        if slab is None:
            return 0
        self._used_bytes -= slab.size_bytes
        return slab.size_bytes
