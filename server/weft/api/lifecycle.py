"""Lifecycle of adapters: register, upload, replace, unregister.

This runs on the event loop; disk access and parsing run in worker threads. Calls that change the same id are
serialized, those for different ids are not. A change is visible only once it is durable, and a failed call leaves
nothing behind. A call that has begun to change the store runs to its end, even if its caller goes away.

Other servers may share the store. A call looks at the store before it decides, and the store decides again under its
lock, so no change of another server is overwritten unseen:

- with `expected_digest`, register and unregister succeed only if the store has that digest for the id, else they raise
  AdapterConflict VERSION_CONFLICT;
- without `replace`, a registration of an id for which the store has other content raises AdapterExists;
- `replace` without `expected_digest` takes the place of whatever is there: the last writer wins, on all servers;
- of several servers that unregister an id, one succeeds.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference, name_of, tenant_of
from weft.adapters.ingest import Ingested
from weft.adapters.loader import AdapterLoader
from weft.adapters.registry import AdapterState, Registry, Version, require_expected
from weft.adapters.store import AdapterStore
from weft.adapters.versions import StagedVersion, Staging
from weft.api import mixtures
from weft.api.following import Following
from weft.api.memory import AdapterMemory
from weft.api.pins import Pins
from weft.api.publication import Publication
from weft.api.tenant_quotas import TenantQuotas
from weft.api.watch import Watches
from weft.api.work import Work
from weft.config import TenantLimits
from weft.engine.engine import Engine, Freed
from weft.engine.request import FinishReason, RequestId
from weft.errors import AdapterConflict, AdapterNotFound, InvalidAdapter, InvalidRequest, Unavailable, WeftError
from weft.metrics import Metrics

_log = logging.getLogger(__name__)

_COPIES_AT_A_TIME = 2  # each takes the disk for a whole adapter until it is checked


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
    """The adapters of one server.

    device_bytes: the memory that the device has for them. pinned_bytes_max: what pinned ones may take of it.
    release_timeout_s: how long unregistering waits for the engine to let go of an adapter.
    """

    engine: Engine
    store: AdapterStore
    loader: AdapterLoader
    work: Work
    device_bytes: int
    pinned_bytes_max: int
    tenants: TenantLimits
    metrics: Metrics
    release_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        self._copying = asyncio.Semaphore(_COPIES_AT_A_TIME)
        self._late: dict[AdapterId, asyncio.Task[Removed]] = {}  # removals that took longer than their calls
        self.watches = Watches()
        self.registry = Registry(changed=self.watches.put)
        self.tenant_quotas = TenantQuotas(self.tenants, self.registry)
        self.memory = AdapterMemory(
            engine=self.engine,
            loader=self.loader,
            store=self.store,
            registry=self.registry,
            watches=self.watches,
            work=self.work,
            pins=Pins(registry=self.registry, tenant_quotas=self.tenant_quotas, bytes_max=self.pinned_bytes_max),
        )
        self.publication = Publication(
            registry=self.registry, memory=self.memory, store=self.store, work=self.work, metrics=self.metrics
        )
        self.following = Following(
            engine=self.engine, store=self.store, loader=self.loader, publication=self.publication, work=self.work
        )

    # -- register ------------------------------------------------------------------------------------------------

    async def register_from(self, wanted: Registration) -> Registered:
        """Register the source, a PEFT directory below the store or an allowed root."""
        self.work.require_open()
        async with self._copying:
            return await self._register(wanted, self._staged(self.store.stage_copy, wanted.source))

    def upload(self) -> AbstractAsyncContextManager[Staging]:
        """Return a context that holds a directory for an upload's files; call `register_upload` inside it."""
        self.work.require_open()
        return self._staged(self.store.stage)

    async def register_upload(self, wanted: Registration, staging: Staging) -> Registered:
        """Register the files that an upload wrote."""
        return await self._register(wanted, nullcontext(staging))

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
        await self.following.look_at(wanted.adapter_id)
        mixtures.require_experts(
            self.registry, ingested.info, tenant=tenant_of(wanted.adapter_id), field="mixture_config"
        )
        changes = self.registry.check_publish(
            wanted.adapter_id, staged.digest, replace=wanted.replace, expected_digest=wanted.expected_digest
        )
        previous = self.registry.published(wanted.adapter_id)
        if not changes:
            assert previous is not None
            if wanted.pin and not wanted.validate_only:
                await self.memory.pin(previous)
            return Registered(previous, Outcome.UNCHANGED)
        self.tenant_quotas.require_adapter(wanted.adapter_id, staged.size_bytes)
        version = Version(
            adapter_id=wanted.adapter_id,
            digest=staged.digest,
            info=ingested.info,
            create_time_s=time.time(),
            pinned=wanted.pin or (previous is not None and previous.pinned),  # a pin belongs to the id
        )
        if not wanted.validate_only:
            await self._commit(version, staged, ingested, wanted, previous)
        return Registered(version, Outcome.CREATED if previous is None else Outcome.REPLACED)

    async def _commit(
        self,
        version: Version,
        staged: StagedVersion,
        ingested: Ingested,
        wanted: Registration,
        previous: Version | None,
    ) -> None:
        """Make a version durable, then current, if the store still has what `previous` is."""
        adapter_id, digest, info = version.adapter_id, version.digest, version.info
        expected_digest = wanted.expected_digest
        if expected_digest is None and not wanted.replace and previous is not None:
            expected_digest = previous.digest or None  # the same content, or an id whose manifest is lost
        commit = partial(
            self.store.commit,
            staged,
            adapter_id=adapter_id,
            method=info.method,
            pinned=version.pinned,
            source=wanted.source,
            info=info.encode(),
            checked_for=self.loader.ingest.checked_for,
            replace=wanted.replace or previous is not None,
            expected_digest=None if expected_digest is None else AdapterDigest(expected_digest),
        )
        with self.memory.pins.room(adapter_id, digest, info.packed_bytes) if version.pinned else nullcontext():
            try:
                if version.pinned:  # first, so that a call that fails for want of room leaves nothing behind
                    await self.memory.bring(digest, pin=True, packed=ingested.packed)
                manifest = await self.work.run(commit)
            except BaseException:
                await self.memory.free(digest)
                raise
            version.create_time_s = datetime.fromisoformat(manifest.create_time).timestamp()
            self.loader.keep(digest, ingested.packed)
            self.publication.publish(version)
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
        """Remove an adapter; return when nothing of it is left.

        Raises Unavailable ENGINE_STALLED if the engine keeps it for `release_timeout_s` after it was asked to end the
        adapter's requests. Then it is out of the catalog, no request can use it, and another call waits for the rest.
        """
        self.work.require_open()

        async def remove() -> Removed:
            removal = self._late.get(adapter_id)
            if removal is None:
                versions = await self._take_out(adapter_id, expected_digest)
                if not cancel:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.publication.wait_released(versions), timeout_s)
                removal = self.work.keep(self._remove(adapter_id, versions))
            ended, _ = await asyncio.wait([removal], timeout=self.release_timeout_s)
            if ended:
                return removal.result()
            if adapter_id not in self._late:
                self._late[adapter_id] = removal
                removal.add_done_callback(lambda _: self._late.pop(adapter_id))
            raise _stalled(adapter_id, self.release_timeout_s)

        return await self.work.to_the_end(remove())

    async def _take_out(self, adapter_id: AdapterId, expected_digest: str | None) -> list[Version]:
        """Remove an id from the store, and refuse new requests for it; return its versions."""
        async with self.work.lock(adapter_id):  # after a registration that came first
            await self.following.look_at(adapter_id)
            versions = self.registry.drain(adapter_id, expected_digest)
            expected = None if expected_digest is None else AdapterDigest(expected_digest)
            try:
                await self.work.run(partial(self.store.remove, adapter_id, expected_digest=expected or None))
            except WeftError:
                self.registry.revive(adapter_id)  # if another server was first, its change follows
                raise
        return versions

    async def _remove(self, adapter_id: AdapterId, versions: list[Version]) -> Removed:
        """End the requests that still hold a version, and free everything."""
        error = AdapterConflict(
            "ADAPTER_UNREGISTERED", f"adapter_id: {name_of(adapter_id)} was unregistered while the request ran"
        )
        leftover = {request_id for version in versions for request_id in version.leases}
        for version in versions:
            version.removal = error  # for requests that the engine does not have yet
        for request_id in leftover:
            self.engine.end(RequestId(request_id), FinishReason.ERROR, error)
        await self.publication.wait_released(versions)
        return Removed(await self.publication.remove(versions), cancelled_requests=len(leftover))

    # -- quarantine ----------------------------------------------------------------------------------------------

    async def quarantine(self, digest: AdapterDigest, reason: str) -> None:
        """Take content out of service under every id, at once and after a restart."""
        for version in self.registry.quarantine(digest, reason):
            _log.warning("%s: quarantined, %s", version.adapter_id, reason)
            try:
                async with self.work.lock(version.adapter_id):
                    await self._keep_quarantine(version, reason)
            except AdapterNotFound:
                pass  # it was unregistered meanwhile
            except WeftError as error:
                _log.warning("%s: the quarantine ends with this server: %s", version.adapter_id, error)

    async def lift_quarantine(self, adapter_id: AdapterId, expected_digest: str | None) -> Version:
        """Put content in service again that was quarantined; do nothing if it is in service."""
        self.work.require_open()
        async with self.work.lock(adapter_id):
            await self.following.look_at(adapter_id)
            version = self.registry.require(AdapterReference(adapter_id, None))
            require_expected(adapter_id, version.digest, expected_digest)
            if version.state is not AdapterState.QUARANTINED:
                return version
            await self._keep_quarantine(version, "")
            version = self.registry.require(AdapterReference(adapter_id, None))
            if version.state is AdapterState.QUARANTINED:  # one that the store could not keep
                self.registry.move(version, AdapterState.ACTIVE, "")
        return version

    async def _keep_quarantine(self, version: Version, reason: str) -> None:
        """Write a quarantine to the store, or its end; the caller holds the id's lock."""
        await self.work.run(self.store.set_quarantined, version.adapter_id, version.digest, reason)
        await self.following.look_at(version.adapter_id)

    def release(self, version: Version, request_id: str) -> None:
        """End a request's lease."""
        self.publication.release(version, request_id)

    # -- inside --------------------------------------------------------------------------------------------------

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


def _stalled(adapter_id: AdapterId, timeout_s: float) -> Unavailable:
    name = name_of(adapter_id)
    text = f"{name} is unregistered, but the engine has not let go of it for {timeout_s:g} s; call again to wait"
    return Unavailable.at("ENGINE_STALLED", "adapter_id", text, retry_after_s=5.0, adapter_id=name)
