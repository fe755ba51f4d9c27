"""Lifecycle of adapters: restore, register, upload, replace, unregister.

This runs on the event loop; disk access and parsing run in worker threads. Calls that change the same id are
serialized, those for different ids are not. A change is visible only once it is durable, and a failed call leaves
nothing behind. A call that has begun to change the store runs to its end, even if its caller goes away.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.ingest import Ingested
from weft.adapters.loader import AdapterLoader
from weft.adapters.registry import AdapterInfo, AdapterState, Registry, Version
from weft.adapters.store import AdapterStore
from weft.adapters.versions import StagedVersion, Staging
from weft.api import mixtures
from weft.api.memory import AdapterMemory
from weft.api.watch import Watches
from weft.api.work import Work
from weft.engine.engine import Engine, Freed
from weft.engine.request import FinishReason, RequestId
from weft.errors import AdapterConflict, InvalidAdapter, InvalidRequest, WeftError
from weft.metrics import Metrics

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """Effect of a registration."""

    CREATED = "created"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A registration that a caller wants; see RegisterAdapterRequest. source: the directory to copy, or ""."""

    adapter_id: AdapterId
    source: str = ""
    replace: bool = False
    expected_digest: str | None = None
    pin: bool = False
    validate_only: bool = False
    content_digest: str | None = None


class Registered(NamedTuple):
    """Result of a registration. `version` is not in the registry if it was only validated."""

    version: Version
    outcome: Outcome


class Removed(NamedTuple):
    """Memory and requests that unregistering freed and ended."""

    freed: Freed
    cancelled_requests: int


@dataclass(kw_only=True, eq=False)
class Lifecycle:
    """The adapters of one server. device_bytes: the memory that the device has for them."""

    engine: Engine
    store: AdapterStore
    loader: AdapterLoader
    work: Work
    device_bytes: int
    metrics: Metrics

    def __post_init__(self) -> None:
        self._lease_ended = asyncio.Event()
        self.watches = Watches()
        self.registry = Registry(changed=self.watches.put)
        self.memory = AdapterMemory(
            engine=self.engine,
            loader=self.loader,
            store=self.store,
            registry=self.registry,
            watches=self.watches,
            work=self.work,
        )

    # -- start ---------------------------------------------------------------------------------------------------

    async def restore(self, progress: Callable[[int, int], None]) -> None:
        """Register the adapters of the store. A bad entry is FAILED with its reason, and does not stop the start."""
        recovery = await self.work.run(self.store.recover)
        for problem in recovery.problems:
            _log.warning("store: %s: %s", problem.path, problem.message)
        total = len(recovery.manifests)
        for done, manifest in enumerate(recovery.manifests.values(), 1):
            version = Version(
                adapter_id=manifest.adapter_id,
                digest=manifest.digest,
                info=AdapterInfo(method=manifest.method, size_bytes=manifest.size_bytes),
                create_time_s=datetime.fromisoformat(manifest.create_time).timestamp(),
                pinned=manifest.pinned,
            )
            try:
                ingested = await self.work.run(self.loader.read, manifest.digest)
            except WeftError as error:
                version.state, version.state_reason = AdapterState.FAILED, error.reason
                _log.warning("store: adapter %s is not served: %s", manifest.adapter_id, error)
            else:
                version.info = ingested.info
                self.loader.keep(manifest.digest, ingested.packed)
                if manifest.quarantined:
                    version.state, version.state_reason = AdapterState.QUARANTINED, manifest.quarantined
            self._publish(version)
            if version.pinned and version.state is AdapterState.ACTIVE:
                self.engine.preload(version.digest, pin=True)  # as soon as possible
            progress(done, total)
        for problem in recovery.problems:
            adapter_id = problem.adapter_id
            if adapter_id is not None and self.registry.current(adapter_id) is None:
                self._publish(Version(adapter_id=adapter_id, state=AdapterState.FAILED, state_reason=problem.reason))

    # -- register ------------------------------------------------------------------------------------------------

    async def register_from(self, wanted: Registration) -> Registered:
        """Register the source, a PEFT directory below the store or an allowed root."""
        self.work.require_open()
        return await self._register(wanted, self._staged(self.store.stage_copy, wanted.source))

    def upload(self) -> AbstractAsyncContextManager[Staging]:
        """Return a context that holds a directory for an upload's files; call `register_upload` inside it."""
        self.work.require_open()
        return self._staged(self.store.stage)

    async def register_upload(self, wanted: Registration, staging: Staging) -> Registered:
        """Register the files that an upload wrote."""
        return await self._register(wanted, contextlib.nullcontext(staging))

    async def _register(self, wanted: Registration, source: AbstractAsyncContextManager[Staging]) -> Registered:
        async def register() -> Registered:
            async with self.work.lock(wanted.adapter_id):
                with self.registry.loading(wanted.adapter_id):
                    async with source as staging:
                        return await self._register_staged(wanted, staging)

        return await self.work.to_the_end(register())

    async def _register_staged(self, wanted: Registration, staging: Staging) -> Registered:
        staged = await self.work.run(staging.seal)
        if wanted.content_digest not in (None, staged.digest):
            rule, most, given = "is not the content's", wanted.content_digest, staged.digest
            raise InvalidRequest.rule("CHECKSUM_MISMATCH", "content_digest", rule, limit=most, given=given)
        ingested = await self.work.run(self.loader.read_staged, staged)
        self._check_fit(ingested)
        mixtures.require_experts(self.registry, ingested.info, field="mixture_config")
        changes = self.registry.check_publish(
            wanted.adapter_id, staged.digest, replace=wanted.replace, expected_digest=wanted.expected_digest
        )
        previous = self.registry.published(wanted.adapter_id)
        if not changes:
            assert previous is not None
            if wanted.pin and not wanted.validate_only:
                await self.memory.pin(previous)
            return Registered(previous, Outcome.UNCHANGED)
        version = Version(
            adapter_id=wanted.adapter_id,
            digest=staged.digest,
            info=ingested.info,
            create_time_s=time.time(),
            pinned=wanted.pin or (previous is not None and previous.pinned),  # a pin belongs to the id
        )
        if not wanted.validate_only:
            await self._commit(version, staged, ingested, wanted.source, replace=previous is not None)
        return Registered(version, Outcome.CREATED if previous is None else Outcome.REPLACED)

    async def _commit(
        self, version: Version, staged: StagedVersion, ingested: Ingested, source: str, *, replace: bool
    ) -> None:
        """Make a version durable, then current."""
        adapter_id, digest, info = version.adapter_id, version.digest, version.info
        commit = partial(self.store.commit, adapter_id=adapter_id, method=info.method, pinned=version.pinned)
        try:
            if version.pinned:  # first, so that a call that fails for want of room leaves nothing behind
                await self.memory.bring(digest, pin=True, packed=ingested.packed)
            manifest = await self.work.run(partial(commit, staged, source=source, replace=replace))
        except BaseException:
            await self.memory.free(digest)
            raise
        version.create_time_s = datetime.fromisoformat(manifest.create_time).timestamp()
        self.loader.keep(digest, ingested.packed)
        replaced = self._publish(version)
        if replaced is not None and not replaced.leases:
            self._free_later(replaced.digest)
        if info.trained_held_as:
            _log.warning("%s: trained on another quantization (%s) of the base", adapter_id, info.trained_held_as)
        if info.trained_rope_factors:
            _log.warning(
                "%s: trained with other rotary factors (%s) than this server's max_model_len takes; answers may differ",
                adapter_id,
                info.trained_rope_factors,
            )

    def _check_fit(self, ingested: Ingested) -> None:
        blocks, packed, reason = self.engine.blocks, ingested.packed, "ADAPTER_TOO_LARGE"
        given, most = packed.buffer.nbytes, self.device_bytes
        if given > most:
            field, rule = "adapter_model.safetensors", "can never fit the adapter pool in bytes"
            raise InvalidAdapter.rule(reason, field, rule, limit=most, given=given)
        given, most = blocks.count(packed.num_virtual_tokens), blocks.num_blocks - 1
        if given > most:
            field, rule = "adapter_config.num_virtual_tokens", "can never fit the KV pool in blocks"
            raise InvalidAdapter.rule(reason, field, rule, limit=most, given=given)

    # -- unregister ----------------------------------------------------------------------------------------------

    async def unregister(
        self, adapter_id: AdapterId, *, cancel: bool, timeout_s: float, expected_digest: str | None
    ) -> Removed:
        """Remove an adapter; return when nothing of it is left."""
        self.work.require_open()

        async def remove() -> Removed:
            async with self.work.lock(adapter_id):  # after a registration that came first
                versions = self.registry.drain(adapter_id, expected_digest)
                try:
                    await self.work.run(self.store.remove, adapter_id)
                except WeftError as error:
                    if error.reason != "ADAPTER_NOT_FOUND":  # another process sharing the store may have been first
                        self.registry.revive(adapter_id)
                        raise
            return await self._remove(adapter_id, versions, cancel=cancel, timeout_s=timeout_s)

        return await self.work.to_the_end(remove())

    async def _remove(
        self, adapter_id: AdapterId, versions: list[Version], *, cancel: bool, timeout_s: float
    ) -> Removed:
        if not cancel:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_released(versions), timeout_s)
        error = AdapterConflict(
            "ADAPTER_UNREGISTERED", f"adapter_id: {adapter_id} was unregistered while the request ran"
        )
        leftover = {request_id for version in versions for request_id in version.leases}
        for version in versions:
            version.removal = error  # for requests that the engine does not have yet
        for request_id in leftover:
            self.engine.end(RequestId(request_id), FinishReason.ERROR, error)
        await self._wait_released(versions)
        self.registry.remove(adapter_id)
        self.metrics.adapters.labels(versions[0].info.method).dec()
        total = Freed()
        for digest in {version.digest for version in versions}:
            total = Freed(*map(sum, zip(total, await self.memory.free(digest), strict=True)))
        await self._collect()
        return Removed(total, cancelled_requests=len(leftover))

    def release(self, version: Version, request_id: str) -> None:
        """End a request's lease. The memory of a replaced version is freed with its last lease."""
        if self.registry.release(version, request_id):
            self._free_later(version.digest)
        self._lease_ended.set()
        self._lease_ended = asyncio.Event()

    async def _wait_released(self, versions: list[Version]) -> None:
        while any(version.leases for version in versions):
            await self._lease_ended.wait()

    def _free_later(self, digest: AdapterDigest) -> None:
        if not self.work.is_closed:
            self.work.keep(self._free(digest))

    async def _free(self, digest: AdapterDigest) -> None:
        await self.memory.free(digest)
        await self._collect()

    async def _collect(self) -> None:
        try:
            await self.work.run(self.store.collect, self.registry.digests())
        except WeftError as error:  # the next collection removes the files that this one could not
            _log.warning("store: %s", error)

    # -- inside --------------------------------------------------------------------------------------------------

    def _publish(self, version: Version) -> Version | None:
        """Make a version current and count it; return the one that it replaced."""
        replaced = self.registry.publish(version)
        self.metrics.adapters.labels(version.info.method).inc()
        if replaced is not None:
            self.metrics.adapters.labels(replaced.info.method).dec()
        return replaced

    @contextlib.asynccontextmanager
    async def _staged(self, stage: Callable[..., Staging], *arguments: object) -> AsyncIterator[Staging]:
        staging = await self.work.run(stage, *arguments)
        try:
            yield staging
        finally:
            if self.work.is_closed:
                staging.close()
            else:
                await self.work.run(staging.close)
