"""Publication of adapters: the steps by which a version becomes current, and leaves, whoever made the change.

Calls of this server and changes of others that share its store take these same steps, on the event loop.
"""

import asyncio
import logging
from dataclasses import dataclass

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.registry import AdapterInfo, Registry, Version
from weft.adapters.store import AdapterStore
from weft.api.memory import AdapterMemory
from weft.api.work import Work
from weft.engine.engine import Freed
from weft.errors import WeftError
from weft.metrics import Metrics

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Publication:
    """The registered adapters of one server, with their leases, memory and files."""

    registry: Registry
    memory: AdapterMemory
    store: AdapterStore
    work: Work
    metrics: Metrics

    def __post_init__(self) -> None:
        self._lease_ended = asyncio.Event()

    def publish(self, version: Version) -> None:
        """Make a version current. The one that it replaces is freed when no request holds it."""
        replaced = self.registry.publish(version)
        self._count(version.info, 1)
        if replaced is not None:
            self._count(replaced.info, -1)
            if not replaced.leases and replaced.digest:
                self._free_later(replaced.digest)

    def ready(self, version: Version, info: AdapterInfo) -> None:
        """Put a version in service that was LOADING."""
        self._count(version.info, -1)
        self.registry.ready(version, info)
        self._count(info, 1)

    def release(self, version: Version, request_id: str) -> None:
        """End a request's lease. The memory of a replaced version is freed with its last lease."""
        if self.registry.release(version, request_id):
            self._free_later(version.digest)
        self._lease_ended.set()
        self._lease_ended = asyncio.Event()

    async def wait_released(self, versions: list[Version]) -> None:
        """Wait until no request holds any of these; callers that answer a request bound the time."""
        while any(version.leases for version in versions):
            await self._lease_ended.wait()

    def withdraw(self, version: Version) -> None:
        """Remove a version, which no request holds, from the registry, unless another is current by now."""
        if self.registry.remove(version):
            self._count(version.info, -1)

    async def remove(self, versions: list[Version]) -> Freed:
        """Remove an id's versions, which no request holds, with their memory and files. The first was current."""
        self.withdraw(versions[0])
        total = Freed()
        digests = {version.digest for version in versions} - {""}
        for digest in digests:
            total = Freed(*map(sum, zip(total, await self.memory.free(digest), strict=True)))
        await self._collect(*digests)
        return total

    def _free_later(self, digest: AdapterDigest) -> None:
        if not self.work.is_closed:
            self.work.keep(self._free(digest))

    async def _free(self, digest: AdapterDigest) -> None:
        await self.memory.free(digest)
        await self._collect(digest)

    async def _collect(self, *digests: AdapterDigest) -> None:
        unused = [digest for digest in digests if not self.registry.of(digest)]
        try:
            await self.work.run(self.store.collect, *unused)
        except WeftError as error:  # the next collection removes the files that this one could not
            _log.warning("store: %s", error)

    def _count(self, info: AdapterInfo, change: int) -> None:
        self.metrics.adapters.labels(info.method).inc(change)
