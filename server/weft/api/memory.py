"""Adapters in memory: read from the store, kept on the host, brought to the device, pinned there, freed.

The engine decides which adapters are on the device and publishes every change; this is the event loop's copy of it.
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference, name_of
from weft.adapters.loader import AdapterLoader
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.registry import Change, Registry, Version
from weft.adapters.store import AdapterStore
from weft.api.pins import Pins
from weft.api.watch import Watches
from weft.api.work import Work
from weft.engine.engine import Engine, Freed
from weft.errors import AdapterNotFound, AdapterUnusable, Overloaded, Unavailable, WeftError


class Residence(StrEnum):
    """The fastest place that holds a copy of an adapter."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(kw_only=True, eq=False)
class AdapterMemory:
    """Device and host copies of the adapters of one server."""

    engine: Engine
    loader: AdapterLoader
    store: AdapterStore
    registry: Registry
    watches: Watches
    work: Work
    pins: Pins
    _resident: frozenset[AdapterDigest] = frozenset()

    # -- calls ---------------------------------------------------------------------------------------------------

    async def load(self, adapter_id: AdapterId, *, to_device: bool, pin: bool | None) -> Version:
        """Bring an adapter into memory and return when it is there."""
        self.work.require_open()
        async with self.work.lock(adapter_id):
            version = self.registry.require_active(AdapterReference(adapter_id, None))
            if pin:
                await self.pin(version)
            elif to_device:
                await self.bring(version.digest)
            elif self.place_of(version.digest) is Residence.DISK:
                await self._read(version.digest)
            if pin is False and version.pinned:
                await self.work.run(self.store.set_pinned, adapter_id, False)
                self._unpin(version)
        return version

    async def unload(self, adapter_id: AdapterId, *, keep_host: bool) -> Version:
        """Free an adapter's memory and remove its pin. Raises ADAPTER_IN_USE, changing nothing, if requests hold it."""
        self.work.require_open()
        async with self.work.lock(adapter_id):
            version = self.registry.require(AdapterReference(adapter_id, None))
            twins = [twin for twin in self.registry.of(version.digest) if twin is not version]
            num_requests = sum(len(twin.leases) for twin in (version, *twins))
            if num_requests:
                raise _in_use(adapter_id, num_requests)
            if not any(twin.pinned for twin in twins):
                if await asyncio.wrap_future(self.engine.evict(version.digest)) is None:
                    raise _in_use(adapter_id, 1)  # by a request of an instant ago
                if not keep_host:
                    self.loader.drop(version.digest)
            if version.pinned:
                await self.work.run(self.store.set_pinned, adapter_id, False)
                self._unpin(version)
            self.watches.put(Change.UPDATED, version)
        return version

    async def pin(self, version: Version) -> None:
        """Bring an adapter to the device and keep it there, also after a restart."""
        with self.pins.room(version.adapter_id, version.digest, version.info.packed_bytes):
            await self.bring(version.digest, pin=True)
            if version.pinned:
                return
            try:
                await self.work.run(self.store.set_pinned, version.adapter_id, True)
            except BaseException:
                self._unpin(version)
                raise
            self.registry.pin(version, True)

    # -- copies --------------------------------------------------------------------------------------------------

    def place_of(self, digest: AdapterDigest) -> Residence:
        """Return the fastest place that holds a copy."""
        if digest in self._resident:
            return Residence.DEVICE
        return Residence.HOST if digest in self.loader else Residence.DISK

    async def bring(self, digest: AdapterDigest, *, pin: bool = False, packed: PackedAdapter | None = None) -> None:
        """Bring an adapter to the device, with `pin` to stay; return when it is there.

        packed: the adapter, if it is loaded already.
        Raises the error of the load, or Overloaded POOL_EXHAUSTED.
        """
        try:
            await asyncio.wrap_future(self.engine.preload(digest, packed=packed, pin=pin))
        except BaseException:
            if not self._is_pinned(digest):
                self.engine.unpin(digest)
            raise

    async def free(self, digest: AdapterDigest) -> Freed:
        """Free every copy, unless an adapter has this content; return when no load reads its files any more."""
        if self.registry.of(digest):
            return Freed()
        # A request can hold it only if it was registered again a moment ago.
        evicted = await asyncio.wrap_future(self.engine.evict(digest))
        if self.registry.of(digest):
            return evicted or Freed()
        freed = (evicted or Freed())._replace(host_bytes=self.loader.drop(digest))
        loads = map(asyncio.wrap_future, self.loader.running(digest))
        await asyncio.gather(*loads, return_exceptions=True)
        return freed

    def residents_are(self, resident: frozenset[AdapterDigest]) -> None:
        """Take over the set of adapters that are now on the device."""
        moved, self._resident = self._resident ^ resident, resident
        for digest in moved:
            for version in self.registry.of(digest):
                if version is self.registry.current(version.adapter_id):
                    self.watches.put(Change.UPDATED, version)

    def failed(self, digest: AdapterDigest, error: WeftError) -> None:
        """Take an adapter out of service whose files are unusable, or unusable on this base."""
        if not isinstance(error, Unavailable | Overloaded | AdapterNotFound):  # temporary, or the adapter was removed
            self.registry.fail(digest, error.reason)

    async def _read(self, digest: AdapterDigest) -> None:
        try:
            await asyncio.wrap_future(self.loader.request(digest))
        except WeftError as error:
            self.failed(digest, error)
            raise

    def _unpin(self, version: Version) -> None:
        self.registry.pin(version, False)
        if not self._is_pinned(version.digest):
            self.engine.unpin(version.digest)

    def _is_pinned(self, digest: AdapterDigest) -> bool:
        return any(version.pinned for version in self.registry.of(digest))


def _in_use(adapter_id: AdapterId, num_requests: int) -> AdapterUnusable:
    name = name_of(adapter_id)
    text = f"{name} is held by {num_requests} requests"
    return AdapterUnusable.at("ADAPTER_IN_USE", "adapter_id", text, adapter_id=name, retry_after_s=1.0)
