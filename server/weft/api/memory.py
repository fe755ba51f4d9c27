"""Adapters in memory: read from the store, kept on the host, brought to the device, pinned there, let go.

The engine decides what is on the device and says so after every change; here is what the event loop knows of it. Disk
and parsing run in worker threads.
"""

import asyncio
import logging
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from weft.adapters.host import HostCache
from weft.adapters.identifiers import AdapterId, AdapterReference, Generation
from weft.adapters.ingest import Ingest, Ingested
from weft.adapters.registry import Change, Registry, Version
from weft.adapters.slab import Slab
from weft.adapters.store import AdapterStore
from weft.adapters.versions import corrupt
from weft.api.work import Work
from weft.engine.engine import Engine
from weft.errors import AdapterNotFound, AdapterUnusable, Overloaded, Unavailable, WeftError
from weft.metrics import Metrics
from weft.v1.adapter_files import pair_of

_log = logging.getLogger(__name__)


class Residence(StrEnum):
    """The fastest place that holds a copy of an adapter."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Freed(NamedTuple):
    """What letting an adapter go gave back."""

    device_bytes: int = 0
    host_bytes: int = 0
    kv_blocks: int = 0


class AdapterMemory:
    """Device and host copies of the adapters of one server.

    changed(change, version): called when an adapter came to the device or left it.
    unwanted(generation): called where content was read that no adapter is any more.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: AdapterStore,
        ingest: Ingest,
        host: HostCache,
        registry: Registry,
        work: Work,
        metrics: Metrics,
        changed: Callable[[Change, Version], None],
        unwanted: Callable[[Generation], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._ingest = ingest
        self._host = host
        self._registry = registry
        self._work = work
        self._metrics = metrics
        self._changed = changed
        self._unwanted = unwanted
        self._resident: frozenset[Generation] = frozenset()
        self._at_hand: dict[Generation, Slab] = {}  # on their way to the device before the store has them
        self._loop = asyncio.get_running_loop()

    # -- calls ---------------------------------------------------------------------------------------------------

    async def load(self, adapter_id: AdapterId, *, to_device: bool, pin: bool | None) -> Version:
        """Bring an adapter into memory and return when it is there."""
        self._work.require_open()
        async with self._work.lock(adapter_id):
            version = self._registry.require_active(AdapterReference(adapter_id, None))
            if pin:
                await self.pin(version)
            elif to_device:
                await self.bring(version.generation)
            elif self.place_of(version.generation) is Residence.DISK:
                await asyncio.wrap_future(self._work.submit(self._slab, version.generation))
            if pin is False and version.pinned:
                await self._work.run(self._store.set_pinned, adapter_id, False)
                self._unpin(version)
        return version

    async def unload(self, adapter_id: AdapterId, *, keep_host: bool) -> Version:
        """Free an adapter's memory and remove its pin; ADAPTER_IN_USE, and nothing changed, while requests hold it."""
        self._work.require_open()
        async with self._work.lock(adapter_id):
            version = self._registry.require(AdapterReference(adapter_id, None))
            twins = [twin for twin in self._registry.of(version.generation) if twin is not version]
            num_requests = sum(len(twin.leases) for twin in (version, *twins))
            if num_requests:
                raise _in_use(adapter_id, num_requests)
            if not any(twin.pinned for twin in twins):
                if await asyncio.wrap_future(self._engine.evict(version.generation)) is None:
                    raise _in_use(adapter_id, 1)  # it came an instant ago
                if not keep_host:
                    self._host.drop(version.generation)
            if version.pinned:
                await self._work.run(self._store.set_pinned, adapter_id, False)
                self._unpin(version)
            self._changed(Change.UPDATED, version)
        return version

    async def pin(self, version: Version) -> None:
        """Bring an adapter to the device to stay there, also after a restart."""
        await self.bring(version.generation, pin=True)
        if version.pinned:
            return
        try:
            await self._work.run(self._store.set_pinned, version.adapter_id, True)
        except BaseException:
            self._unpin(version)
            raise
        self._registry.pin(version, True)

    # -- copies --------------------------------------------------------------------------------------------------

    def place_of(self, generation: Generation) -> Residence:
        """Where the fastest copy is."""
        if generation in self._resident:
            return Residence.DEVICE
        return Residence.HOST if generation in self._host else Residence.DISK

    def keep(self, generation: Generation, slab: Slab) -> None:
        """Keep a slab on the host."""
        self._host.put(generation, slab)

    def read(self, generation: Generation) -> Ingested:
        """Read and check a stored adapter; blocks on the disk."""
        with self._store.open_version(generation) as stored:
            pair = pair_of(stored.files)
            if pair is None:
                raise corrupt(generation, "it holds other files than an adapter has")
            config, weights = (stored.files[name] for name in pair)
            return self._ingest.read(config, weights, size_bytes=stored.size_bytes, files=pair)

    async def bring(self, generation: Generation, *, pin: bool = False, slab: Slab | None = None) -> None:
        """Return when the adapter is on the device, with `pin` to stay. `slab` spares the way to the disk.

        Raises what its load failed with, or Overloaded POOL_EXHAUSTED.
        """
        if slab is not None:
            self._at_hand[generation] = slab
        if pin:
            self._engine.pin(generation)
        try:
            await asyncio.wrap_future(self._engine.preload(generation))
        except BaseException:
            if not self._is_pinned(generation):
                self._engine.unpin(generation)
            raise
        finally:
            self._at_hand.pop(generation, None)

    def bring_pinned(self, version: Version) -> None:
        """Bring what was pinned before a restart, as soon as that can be."""
        self._engine.pin(version.generation)

    async def free(self, generation: Generation) -> Freed:
        """Let every copy go, unless an adapter is this content."""
        if self._is_wanted(generation):
            return Freed()
        # It is held only if it was registered again a moment ago.
        evicted = await asyncio.wrap_future(self._engine.evict(generation))
        freed = Freed() if evicted is None else Freed(device_bytes=evicted.device_bytes, kv_blocks=evicted.kv_blocks)
        return freed if self._is_wanted(generation) else freed._replace(host_bytes=self._host.drop(generation))

    def residents_are(self, resident: frozenset[Generation]) -> None:
        """The engine's word on what is on the device."""
        moved, self._resident = self._resident ^ resident, resident
        for generation in moved:
            for version in self._registry.of(generation):
                if version is self._registry.current(version.adapter_id):
                    self._changed(Change.UPDATED, version)

    def fetch(self, generation: Generation) -> None:
        """The engine wants an adapter; called on the engine thread. Answers with `loaded` or `load_failed`."""
        try:
            self._work.submit(self._fetch, generation)
        except Unavailable as error:
            self._engine.load_failed(generation, error)

    def _fetch(self, generation: Generation) -> None:
        try:
            with self._metrics.adapter_load_seconds.time():
                slab = self._slab(generation)
        except WeftError as error:
            self._engine.load_failed(generation, error)
        except Exception:
            _log.exception("loading an adapter failed")
            self._engine.load_failed(generation, WeftError("INTERNAL", "internal error"))
        else:
            self._engine.loaded(generation, slab)

    def _slab(self, generation: Generation) -> Slab:
        """From the host, or from the disk to the host; runs in a worker thread."""
        slab = self._at_hand.get(generation) or self._host.get(generation)
        if slab is not None:
            return slab
        try:
            slab = self.read(generation).slab
        except WeftError as error:
            if not isinstance(error, Unavailable | Overloaded | AdapterNotFound):  # these pass, or it was removed
                self._loop.call_soon_threadsafe(self._registry.fail, generation, error.reason)
            raise
        self._host.put(generation, slab)
        self._loop.call_soon_threadsafe(self._was_read, generation)
        return slab

    def _was_read(self, generation: Generation) -> None:
        """It may have been unregistered meanwhile."""
        if not self._is_wanted(generation):
            self._unwanted(generation)

    def _unpin(self, version: Version) -> None:
        self._registry.pin(version, False)
        if not self._is_pinned(version.generation):
            self._engine.unpin(version.generation)

    def _is_pinned(self, generation: Generation) -> bool:
        return any(version.pinned for version in self._registry.of(generation))

    def _is_wanted(self, generation: Generation) -> bool:
        return bool(self._registry.of(generation))


def _in_use(adapter_id: AdapterId, num_requests: int) -> AdapterUnusable:
    return AdapterUnusable(
        "ADAPTER_IN_USE",
        f"adapter_id: {adapter_id} is held by {num_requests} requests",
        field="adapter_id",
        metadata={"adapter_id": adapter_id},
        retry_after_s=1.0,
    )
