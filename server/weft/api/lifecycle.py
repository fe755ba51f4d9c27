"""Adapters coming and going: register, upload, replace, unregister, load, unload, watch.

Runs on the event loop; disk and parsing run in worker threads, device memory is the engine's. Calls for one id are
serialized, different ids are not. Nothing is visible before it is durable, and a failed call leaves nothing behind.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from weft.adapters.config_file import CONFIG_FILE
from weft.adapters.host import HostCache
from weft.adapters.identifiers import AdapterId, AdapterReference, Generation
from weft.adapters.ingest import Ingest, Ingested
from weft.adapters.registry import AdapterInfo, AdapterState, Change, Registry, Version
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.adapters.slab import Slab
from weft.adapters.store import AdapterStore
from weft.adapters.versions import StagedVersion, Staging
from weft.engine.engine import Engine
from weft.errors import AdapterConflict, AdapterUnusable, InvalidAdapter, InvalidRequest, Overloaded, WeftError
from weft.metrics import Metrics

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Outcome(StrEnum):
    """What registering changed."""

    CREATED = "created"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


class Residence(StrEnum):
    """The fastest place that holds a copy of an adapter."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterOptions:
    """How to register; see RegisterAdapterRequest."""

    replace: bool = False
    expected_generation: str | None = None
    pin: bool = False
    validate_only: bool = False
    content_generation: str | None = None


class Registered(NamedTuple):
    """What a registration made. `version` is not in the registry when it was validated only."""

    version: Version
    outcome: Outcome


class Removed(NamedTuple):
    """What unregistering freed."""

    device_bytes: int = 0
    host_bytes: int = 0
    kv_blocks: int = 0
    cancelled_requests: int = 0


class Lifecycle:
    """The adapters of one server.

    cancel(request id, error): ends a running request; the id is one of a version's leases.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: AdapterStore,
        ingest: Ingest,
        host: HostCache,
        device_bytes: int,
        metrics: Metrics,
        cancel: Callable[[str, WeftError], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._ingest = ingest
        self._host = host
        self._device_bytes = device_bytes
        self._metrics = metrics
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self.registry = Registry(idle=self._went_idle, released=self._released, changed=self._changed)
        self._lease_ended = asyncio.Event()
        self._locks: dict[AdapterId, asyncio.Lock] = {}
        self._resident: frozenset[Generation] = frozenset()
        self._watchers: set[asyncio.Queue[tuple[Change, Version] | None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="weft-adapters")

    async def close(self) -> None:
        """End watches and background work."""
        for watcher in self._watchers:
            watcher.put_nowait(None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- start ---------------------------------------------------------------------------------------------------

    async def restore(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Bring back what the store holds. A bad entry is FAILED with its reason; it never stops the start."""
        recovery = await self._work(self._store.recover)
        for problem in recovery.problems:
            _log.warning("store: %s: %s", problem.path, problem.message)
        total = len(recovery.manifests)
        for done, manifest in enumerate(recovery.manifests.values(), 1):
            version = Version(
                adapter_id=manifest.adapter_id,
                generation=manifest.generation,
                info=AdapterInfo(method=manifest.method, size_bytes=manifest.size_bytes),
                create_time_s=datetime.fromisoformat(manifest.create_time).timestamp(),
                pinned=manifest.pinned,
            )
            try:
                ingested = await self._work(self._read_stored, manifest.generation)
            except WeftError as error:
                version.state, version.state_reason = AdapterState.FAILED, error.reason
                _log.warning("store: adapter %s is not served: %s", manifest.adapter_id, error)
            else:
                version.info = ingested.info
                self._host.put(manifest.generation, ingested.slab)
            self.registry.publish(version)
            if version.pinned and version.state is AdapterState.ACTIVE:
                self._engine.pin(version.generation)
            progress(done, total)
        for problem in recovery.problems:
            if problem.adapter_id is not None and self.registry.current(problem.adapter_id) is None:
                self.registry.publish(
                    Version(
                        adapter_id=problem.adapter_id,
                        generation=Generation(""),
                        info=AdapterInfo(),
                        create_time_s=0.0,
                        state=AdapterState.FAILED,
                        state_reason=problem.reason,
                    )
                )

    # -- register ------------------------------------------------------------------------------------------------

    async def register_from(self, adapter_id: AdapterId, source: str, options: RegisterOptions) -> Registered:
        """Register a PEFT directory of the store or of an allowed place."""
        async with self._registering(adapter_id):
            staging = await self._work(self._store.stage_copy, source)
            return await self._register_staged(adapter_id, staging, options, source)

    @contextlib.asynccontextmanager
    async def upload(self, adapter_id: AdapterId) -> AsyncIterator[Staging]:
        """A place for an upload's files, held for `adapter_id` until the block ends; then `register_upload`."""
        async with self._registering(adapter_id):
            staging = await self._work(self._store.stage)
            try:
                yield staging
            finally:
                await self._work(staging.discard)

    async def register_upload(self, adapter_id: AdapterId, staging: Staging, options: RegisterOptions) -> Registered:
        """Register what an upload wrote; inside the `upload` block."""
        return await self._register_staged(adapter_id, staging, options, "")

    async def write(self, function: Callable[[], T]) -> T:
        """Run an upload's disk work beside the event loop."""
        return await self._work(function)

    async def _register_staged(
        self, adapter_id: AdapterId, staging: Staging, options: RegisterOptions, source: str
    ) -> Registered:
        try:
            staged = await self._work(staging.seal)
            if options.content_generation not in (None, staged.generation):
                raise InvalidRequest.rule(
                    "CHECKSUM_MISMATCH",
                    "content_generation",
                    "is not the content's",
                    limit=options.content_generation,
                    given=staged.generation,
                )
            ingested = await self._work(self._read_staged, staged)
            self._check_fit(ingested)
            return await self._publish(adapter_id, staged, ingested, options, source)
        finally:
            await self._work(staging.discard)

    async def _publish(
        self, adapter_id: AdapterId, staged: StagedVersion, ingested: Ingested, options: RegisterOptions, source: str
    ) -> Registered:
        generation = staged.generation
        changes = self.registry.check_publish(
            adapter_id, generation, replace=options.replace, expected_generation=options.expected_generation
        )
        current = self.registry.current(adapter_id)
        previous = None if current is None or current.state is AdapterState.LOADING else current
        if not changes:
            assert previous is not None
            if options.pin and not options.validate_only:
                await self._pin(previous)
            return Registered(previous, Outcome.UNCHANGED)
        version = Version(
            adapter_id=adapter_id, generation=generation, info=ingested.info, create_time_s=0.0, pinned=options.pin
        )
        outcome = Outcome.CREATED if previous is None else Outcome.REPLACED
        if options.validate_only:
            return Registered(version, outcome)
        manifest = await self._work(
            lambda: self._store.commit(
                staged,
                adapter_id=adapter_id,
                method=ingested.info.method,
                pinned=options.pin,
                source=source,
                replace=previous is not None,
            )
        )
        version.create_time_s = datetime.fromisoformat(manifest.create_time).timestamp()
        self._host.put(generation, ingested.slab)
        self.registry.publish(version)
        if options.pin:
            await self._pin(version)
        return Registered(version, outcome)

    def _check_fit(self, ingested: Ingested) -> None:
        if ingested.slab.buffer.nbytes > self._device_bytes:
            raise InvalidAdapter.rule(
                "ADAPTER_TOO_LARGE",
                "adapter_model.safetensors",
                "can never fit the adapter pool in bytes",
                limit=self._device_bytes,
                given=ingested.slab.buffer.nbytes,
            )
        blocks = self._engine.blocks
        needed = -(-ingested.slab.num_virtual_tokens // blocks.block_size)
        if needed >= blocks.num_blocks:
            raise InvalidAdapter.rule(
                "ADAPTER_TOO_LARGE",
                "adapter_config.num_virtual_tokens",
                "can never fit the KV pool in blocks",
                limit=blocks.num_blocks - 1,
                given=needed,
            )

    # -- unregister ----------------------------------------------------------------------------------------------

    async def unregister(
        self, adapter_id: AdapterId, *, cancel: bool, timeout_s: float, expected_generation: str | None
    ) -> Removed:
        """Remove an adapter; returns when nothing of it is left. Goes on if the caller leaves."""
        versions = self.registry.drain(adapter_id, expected_generation)
        task = asyncio.create_task(self._remove(adapter_id, versions, cancel=cancel, timeout_s=timeout_s))
        self._keep(task)
        return await asyncio.shield(task)

    async def _remove(
        self, adapter_id: AdapterId, versions: list[Version], *, cancel: bool, timeout_s: float
    ) -> Removed:
        async with self._lock(adapter_id):
            try:
                await self._work(self._store.remove, adapter_id)
            except WeftError as error:
                if error.reason != "ADAPTER_NOT_FOUND":  # another process sharing the store may have been first
                    self.registry.revive(adapter_id)
                    raise
            if not cancel:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wait_released(versions), timeout_s)
            leftover = {request_id for version in versions for request_id in version.leases}
            for request_id in leftover:
                error = AdapterConflict(
                    "ADAPTER_UNREGISTERED", f"adapter_id: {adapter_id} was unregistered while the request ran"
                )
                self._cancel(request_id, error)
            await self._wait_released(versions)
            generations = {version.generation for version in versions}
            self.registry.remove(adapter_id)
            removed = Removed(cancelled_requests=len(leftover))
            for generation in generations - self.registry.generations():
                freed = await asyncio.wrap_future(self._engine.evict(generation))
                removed = removed._replace(
                    device_bytes=removed.device_bytes + freed.device_bytes,
                    host_bytes=removed.host_bytes + self._host.drop(generation),
                    kv_blocks=removed.kv_blocks + freed.kv_blocks,
                )
            await self._collect()
        return removed

    async def _wait_released(self, versions: list[Version]) -> None:
        while any(version.leases for version in versions):
            await self._lease_ended.wait()

    def _released(self) -> None:
        self._lease_ended.set()
        self._lease_ended = asyncio.Event()

    def _went_idle(self, version: Version) -> None:
        """A replaced version has no requests left: its memory goes."""
        if version.state is AdapterState.DRAINING and self.registry.current(version.adapter_id) is not version:
            self._keep(asyncio.create_task(self._free(version.generation)))

    async def _free(self, generation: Generation) -> None:
        if generation in self.registry.generations() or not generation:
            return
        self._host.drop(generation)
        await asyncio.wrap_future(self._engine.evict(generation))
        await self._collect()

    async def _collect(self) -> None:
        try:
            await self._work(self._store.collect, self.registry.generations())
        except WeftError as error:  # files that cannot be removed now are removed by the next collection
            _log.warning("store: %s", error)

    # -- residency -----------------------------------------------------------------------------------------------

    async def load(self, adapter_id: AdapterId, *, to_device: bool, pin: bool | None) -> Version:
        """Bring an adapter into memory and return when it is there."""
        version = self._require_active(adapter_id)
        if to_device:
            if pin:
                await self._pin(version)
            else:
                self._engine.preload(version.generation)
                await self._wait_resident(version)
        elif version.generation not in self._host:
            await self._work(self._fetch, version.generation)
        if pin is False and version.pinned:
            await self._work(self._store.set_pinned, adapter_id, False)
            self._engine.unpin(version.generation)
            self.registry.pin(version, False)
        return version

    async def unload(self, adapter_id: AdapterId, *, keep_host: bool) -> Version:
        """Free an adapter's memory; ADAPTER_IN_USE while requests hold it."""
        version = self._require_registered(adapter_id)
        users = [other for other in self._all_versions() if other.generation == version.generation and other.leases]
        if users:
            raise AdapterUnusable(
                "ADAPTER_IN_USE",
                f"adapter_id: {adapter_id} is held by {sum(len(v.leases) for v in users)} requests",
                field="adapter_id",
                metadata={"adapter_id": adapter_id},
                retry_after_s=1.0,
            )
        if version.pinned:
            await self._work(self._store.set_pinned, adapter_id, False)
            self.registry.pin(version, False)
        await asyncio.wrap_future(self._engine.evict(version.generation))
        if not keep_host:
            self._host.drop(version.generation)
        await self._refresh_resident()
        self._changed(Change.UPDATED, version)
        return version

    def residence(self, version: Version) -> Residence:
        """Where the fastest copy is, as of the last look at the device (`refresh`)."""
        if version.generation in self._resident:
            return Residence.DEVICE
        return Residence.HOST if version.generation in self._host else Residence.DISK

    async def refresh(self) -> None:
        """Look which adapters are on the device now."""
        await self._refresh_resident()

    def fetch(self, generation: Generation) -> None:
        """The engine wants an adapter; called on the engine thread. Answers with `loaded` or `load_failed`."""
        self._threads.submit(self._fetch_for_engine, generation)

    def _fetch_for_engine(self, generation: Generation) -> None:
        try:
            with self._metrics.adapter_load_seconds.time():
                slab = self._fetch(generation)
        except WeftError as error:
            self._engine.load_failed(generation, error)
            self._loop.call_soon_threadsafe(self._load_failed, generation, error)
        except Exception:
            _log.exception("loading an adapter failed")
            self._engine.load_failed(generation, WeftError("INTERNAL", "internal error"))
        else:
            self._engine.loaded(generation, slab)

    def _load_failed(self, generation: Generation, error: WeftError) -> None:
        for version in self._all_versions():
            if version.generation == generation and version.state is AdapterState.ACTIVE:
                version.state, version.state_reason = AdapterState.FAILED, error.reason
                self._changed(Change.UPDATED, version)

    def _fetch(self, generation: Generation) -> Slab:
        slab = self._host.get(generation)
        if slab is None:
            slab = self._read_stored(generation).slab
            self._host.put(generation, slab)
        return slab

    async def _pin(self, version: Version) -> None:
        self._engine.pin(version.generation)
        try:
            await self._wait_resident(version)
        except WeftError:
            self._engine.unpin(version.generation)
            raise
        if not version.pinned:
            await self._work(self._store.set_pinned, version.adapter_id, True)
        self.registry.pin(version, True)

    async def _wait_resident(self, version: Version) -> None:
        while True:
            placed, has_arrived = await asyncio.wrap_future(
                self._engine.call(lambda: self._engine.residency.placement(version.generation))
            )
            if placed:
                break
            if has_arrived:
                raise Overloaded(
                    "POOL_EXHAUSTED",
                    f"adapter_id: no room on the device for {version.adapter_id}; everything there is in use or pinned",
                    metadata={"quota": "adapter_device_bytes", "adapter_id": version.adapter_id},
                    retry_after_s=1.0,
                )
            if version.state is not AdapterState.ACTIVE:
                self._require_active(version.adapter_id)
            await asyncio.sleep(0.005)
        await self._refresh_resident()
        self._changed(Change.UPDATED, version)

    async def _refresh_resident(self) -> None:
        self._resident = await asyncio.wrap_future(self._engine.call(self._engine.residency.resident))

    # -- reading -------------------------------------------------------------------------------------------------

    def _require_registered(self, adapter_id: AdapterId) -> Version:
        return self.registry.require(AdapterReference(adapter_id, None))

    def _require_active(self, adapter_id: AdapterId) -> Version:
        version = self.registry.acquire(AdapterReference(adapter_id, None), "")
        self.registry.release(version, "")
        return version

    def _all_versions(self) -> Iterator[Version]:
        for current in self.registry:
            yield from self.registry.versions(current.adapter_id)

    @contextlib.contextmanager
    def watching(self) -> "Iterator[asyncio.Queue[tuple[Change, Version] | None]]":
        """A queue of every change from now on; None is the last item, when the server ends."""
        queue: asyncio.Queue[tuple[Change, Version] | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def _changed(self, change: Change, version: Version) -> None:
        counts: dict[str, int] = {}
        for current in self.registry:
            counts[current.info.method] = counts.get(current.info.method, 0) + 1
        self._metrics.adapters.clear()
        for method, count in counts.items():
            self._metrics.adapters.labels(method).set(count)
        for watcher in self._watchers:
            watcher.put_nowait((change, version))

    # -- inside --------------------------------------------------------------------------------------------------

    def _lock(self, adapter_id: AdapterId) -> asyncio.Lock:
        return self._locks.setdefault(adapter_id, asyncio.Lock())

    @contextlib.asynccontextmanager
    async def _registering(self, adapter_id: AdapterId) -> AsyncIterator[None]:
        async with self._lock(adapter_id):
            self.registry.begin(adapter_id)
            try:
                yield
            finally:
                self.registry.abandon(adapter_id)

    def _read_staged(self, staged: StagedVersion) -> Ingested:
        with staged.open(CONFIG_FILE) as config, staged.open(WEIGHTS_FILE) as weights:
            return self._ingest.read(config, weights, size_bytes=staged.size_bytes)

    def _read_stored(self, generation: Generation) -> Ingested:
        with self._store.open_version(generation) as stored:
            return self._ingest.read(
                stored.files[CONFIG_FILE], stored.files[WEIGHTS_FILE], size_bytes=stored.size_bytes
            )

    async def _work(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        """Hold a background task until it ends."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
