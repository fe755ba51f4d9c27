"""The registry follows the store's catalog: at the start, and whenever another server changes it.

A start reads the manifests alone. An adapter whose manifest describes it for this very server is ACTIVE at once, and
its files are hashed at their first use; the others are LOADING until their files have been read, one after another.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from weft.adapters.catalog import Manifest, Problem
from weft.adapters.catalog_watch import CatalogWatch
from weft.adapters.identifiers import AdapterId
from weft.adapters.loader import AdapterLoader
from weft.adapters.registry import AdapterInfo, AdapterState, Version
from weft.adapters.store import AdapterStore
from weft.api.publication import Publication
from weft.api.work import Work
from weft.engine.engine import Engine
from weft.errors import WeftError

_PUBLISHED_AT_ONCE = 200  # without giving way on the event loop, about 5 ms

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Following:
    """The catalog's way into the registry of one server."""

    engine: Engine
    store: AdapterStore
    loader: AdapterLoader
    publication: Publication
    work: Work

    def __post_init__(self) -> None:
        self._registry = self.publication.registry
        self._checked_for = self.loader.ingest.checked_for
        self._quarantined: set[AdapterId] = set()  # in their manifests
        self._loop = asyncio.get_running_loop()
        self._watch = CatalogWatch(self.store.index, self._see)

    async def restore(self, progress: Callable[[int, int], None]) -> None:
        """Register the adapters of the store, and follow it from now on.

        A bad entry is FAILED with its reason, and does not stop the start.
        """
        versions = await self.work.run(self._read_store)
        for done, version in enumerate(versions, 1):
            self._publish(version)
            if done % _PUBLISHED_AT_ONCE == 0 or done == len(versions):
                progress(done, len(versions))
                await asyncio.sleep(0)
        unread = [version for version in versions if version.state is AdapterState.LOADING]
        self.work.keep(self._read_all(unread))
        self._watch.start()

    def stop(self) -> None:
        """Follow no further changes."""
        self._watch.stop()

    async def look_at(self, adapter_id: AdapterId) -> None:
        """Bring one id up to date with the store now; the caller holds the id's lock."""
        await self.work.run(self.store.index.look_at, adapter_id)
        self._catch_up(adapter_id)

    # -- manifests to versions -----------------------------------------------------------------------------------

    def _read_store(self) -> list[Version]:
        """Return a version for every id in the store; runs in a worker thread."""
        recovery = self.store.recover()
        self.store.index.take_changed()
        for problem in recovery.problems:
            _log.warning("store: %s: %s", problem.path, problem.message)
        failed = [self._failed(problem) for problem in recovery.problems if problem.adapter_id is not None]
        return [*map(self._version, recovery.manifests.values()), *failed]

    def _version(self, manifest: Manifest) -> Version:
        info = self._info(manifest)
        state = AdapterState.LOADING if info is None else AdapterState.ACTIVE
        if manifest.quarantined:
            state = AdapterState.QUARANTINED
        return Version(
            adapter_id=manifest.adapter_id,
            digest=manifest.digest,
            info=info or AdapterInfo(method=manifest.method, size_bytes=manifest.size_bytes),
            create_time_s=datetime.fromisoformat(manifest.create_time).timestamp(),
            state=state,
            state_reason=manifest.quarantined,
            pinned=manifest.pinned,
        )

    def _failed(self, problem: Problem) -> Version:
        """Return a version that is out of service, with its digest if only its files are unusable."""
        assert problem.adapter_id is not None, problem
        entry = self.store.index.get(problem.adapter_id)
        version = self._version(entry) if isinstance(entry, Manifest) else Version(adapter_id=problem.adapter_id)
        version.state, version.state_reason = AdapterState.FAILED, problem.reason
        return version

    def _info(self, manifest: Manifest) -> AdapterInfo | None:
        """Return the description of an adapter, if it was checked for this base, with these limits."""
        if manifest.checked_for != self._checked_for:
            return None
        with contextlib.suppress(ValueError):
            return AdapterInfo.decode(manifest.info)
        return None

    def _publish(self, version: Version) -> None:
        self.publication.publish(version)
        if version.state is AdapterState.QUARANTINED:
            self._quarantined.add(version.adapter_id)
        if version.pinned and version.state is AdapterState.ACTIVE:
            self.engine.preload(version.digest, pin=True)  # as soon as possible

    # -- changes -------------------------------------------------------------------------------------------------

    def _see(self, ids: set[AdapterId]) -> None:
        """Pass changed ids from the thread that found them to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._follow_all, ids)

    def _follow_all(self, ids: set[AdapterId]) -> None:
        if not self.work.is_closed:
            for adapter_id in ids:
                self.work.keep(self._follow(adapter_id))

    async def _follow(self, adapter_id: AdapterId) -> None:
        async with self.work.lock(adapter_id):  # so that a call of this server is either not begun or published
            self._catch_up(adapter_id)
            version = self._registry.current(adapter_id)
            if version is not None and (version.state, version.state_reason) == (AdapterState.FAILED, "BLOB_CORRUPT"):
                self.work.keep(self._read(version))  # another server may have repaired the files

    def _catch_up(self, adapter_id: AdapterId) -> None:
        """Make an id what the index says. It also has this server's own changes, which are nothing new here."""
        entry, version = self.store.index.get(adapter_id), self._registry.published(adapter_id)
        match entry:
            case None:
                self._quarantined.discard(adapter_id)
                if version is not None and version.state is not AdapterState.DRAINING:
                    self._drop(adapter_id)
            case Problem():
                _log.warning("store: %s: %s", entry.path, entry.message)
                if version is None:
                    self._publish(self._failed(entry))
            case Manifest():
                is_draining = version is not None and version.state is AdapterState.DRAINING
                if version is None or version.digest != entry.digest or is_draining:
                    self._quarantined.discard(adapter_id)
                    version = self._version(entry)
                    self._publish(version)
                    if version.state is AdapterState.LOADING:
                        self.work.keep(self._read(version))
                else:
                    self._update(version, entry)

    def _update(self, version: Version, manifest: Manifest) -> None:
        """Take over what can change about an id while its content stays: the pin and the quarantine."""
        adapter_id, state = version.adapter_id, AdapterState
        if version.pinned != manifest.pinned:
            self._registry.pin(version, manifest.pinned)
            if manifest.pinned and version.state is state.ACTIVE:
                self.engine.preload(version.digest, pin=True)
            elif not any(twin.pinned for twin in self._registry.of(version.digest)):
                self.engine.unpin(version.digest)
        if manifest.quarantined:
            self._quarantined.add(adapter_id)
            if version.state in (state.ACTIVE, state.LOADING):
                self._registry.move(version, state.QUARANTINED, manifest.quarantined)
        elif adapter_id in self._quarantined:
            self._quarantined.discard(adapter_id)
            if version.state is state.QUARANTINED:
                lifted = self._version(manifest)
                self._publish(lifted)
                if lifted.state is state.LOADING:
                    self.work.keep(self._read(lifted))

    def _drop(self, adapter_id: AdapterId) -> None:
        """Remove an id that another server unregistered: now, or once the requests inside have ended."""
        versions = self._registry.drain(adapter_id, None)
        if not any(version.leases for version in versions):
            self.publication.withdraw(versions[0])
        self.work.keep(self._remove(versions))

    async def _remove(self, versions: list[Version]) -> None:
        await self.publication.wait_released(versions)
        await self.publication.remove(versions)

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read_all(self, versions: list[Version]) -> None:
        for version in versions:
            await self._read(version)

    async def _read(self, version: Version) -> None:
        """Read the files of a version, and put it in service or out of it; nothing stops the next one."""
        adapter_id, digest, state = version.adapter_id, version.digest, version.state
        ingested, reason = None, ""
        try:
            ingested = await self.work.run(self.loader.read, digest)
        except WeftError as error:
            reason = error.reason
            _log.warning("store: adapter %s is not served: %s", adapter_id, error)
        except Exception:
            reason = "INTERNAL"
            _log.exception("store: adapter %s is not served", adapter_id)
        if self._registry.current(adapter_id) is not version or version.state is not state:
            return  # it was changed meanwhile
        if ingested is None:
            self._registry.move(version, AdapterState.FAILED, reason)
            return
        self.publication.ready(version, ingested.info)
        if version.pinned:
            self.engine.preload(digest, packed=ingested.packed, pin=True)
        describe = self.store.set_described, adapter_id, digest, ingested.info.encode(), self._checked_for
        try:
            await self.work.run(*describe)
        except WeftError as error:  # the next start reads the files again
            _log.warning("store: %s", error)
