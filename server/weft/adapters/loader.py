"""Load adapters from disk to host memory: worker threads read them, and an LRU cache keeps them packed."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.ingest import Ingest, Ingested
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.storage import storage_errors
from weft.adapters.store import AdapterStore
from weft.adapters.versions import StagedVersion, StoredVersion, corrupt
from weft.errors import AdapterNotFound, InvalidAdapter, Unavailable, WeftError, draining_error
from weft.metrics import Metrics
from weft.v1.adapter_files import pair_of

_log = logging.getLogger(__name__)


class HostCache:
    """At most `capacity_bytes` of packed adapters, together with those on their way to the device.

    A larger one is not kept. AdapterLoader's lock guards it.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._reserved: Mapping[AdapterDigest, int] = {}
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
        if packed.size_bytes > self.capacity_bytes:
            return
        self._packed_adapters[digest] = packed
        self.used_bytes += packed.size_bytes
        self._trim()

    def reserve(self, on_the_way: Mapping[AdapterDigest, int]) -> None:
        """Leave room for adapters on their way, by their bytes."""
        self._reserved = on_the_way
        self._trim()

    def _trim(self) -> None:
        """Evict the oldest ones that are not on their way; what is on its way counts once, also if it is cached."""
        cached = self._packed_adapters
        twice = sum(cached[digest].size_bytes for digest in self._reserved if digest in cached)
        most = self.capacity_bytes - sum(self._reserved.values()) + twice
        for digest in [digest for digest in cached if digest not in self._reserved]:
            if self.used_bytes <= most:
                return
            self.drop(digest)

    def drop(self, digest: AdapterDigest) -> int:
        """Drop a packed adapter; return its bytes."""
        packed = self._packed_adapters.pop(digest, None)
        freed = 0 if packed is None else packed.size_bytes
        self.used_bytes -= freed
        return freed


@dataclass(slots=True, eq=False)
class _Load:
    """A load that has not ended. is_kept: whether its result may be kept, as the adapter was not dropped meanwhile."""

    digest: AdapterDigest
    is_kept: bool = True


@dataclass(kw_only=True, eq=False)
class AdapterLoader:
    """Host copies of stored adapters. Any thread may call it.

    workers: the threads that read and parse. size_of: the bytes of an adapter once it is packed; 0 if unknown.
    """

    store: AdapterStore
    ingest: Ingest
    host: HostCache
    workers: Executor
    metrics: Metrics
    size_of: Callable[[AdapterDigest], int] = lambda digest: 0

    def __post_init__(self) -> None:
        self._loads: dict[Future[PackedAdapter], _Load] = {}
        self._lock = threading.Lock()  # of the loads and the host cache

    def __contains__(self, digest: AdapterDigest) -> bool:
        with self._lock:
            return digest in self.host

    @property
    def capacity_bytes(self) -> int:
        return self.host.capacity_bytes

    def reserve(self, on_the_way: Mapping[AdapterDigest, int]) -> None:
        """Leave room in the host's memory for adapters on their way to the device, by their bytes."""
        with self._lock:
            self.host.reserve(on_the_way)

    def request(self, digest: AdapterDigest) -> "Future[PackedAdapter]":
        """Return a future that ends with the packed adapter, or with WeftError."""
        with self._lock:
            load = _Load(digest)
            try:
                future = self.workers.submit(self._load, load)
            except RuntimeError:  # raised by an executor that was shut down
                future = Future()
                future.set_exception(draining_error())
            self._loads[future] = load
        future.add_done_callback(self._ended)
        return future

    def running(self, digest: AdapterDigest) -> "list[Future[PackedAdapter]]":
        """Return the loads of a digest that have not ended; the store cannot remove a version that is being read."""
        with self._lock:
            return [future for future, load in self._loads.items() if load.digest == digest]

    def read(self, digest: AdapterDigest) -> Ingested:
        """Read and check a stored adapter; blocks on the disk. Raises WeftError.

        Unavailable ADAPTER_CHANGED says that another server has just removed the files; the catalog will show it soon.
        """
        try:
            with storage_errors(), self.store.open_version(digest) as stored:
                return self._read(digest, stored)
        except AdapterNotFound as error:
            text = f"{error.message}: another server replaced or unregistered it"
            raise Unavailable("ADAPTER_CHANGED", text, retry_after_s=0.5) from None

    def _read(self, digest: AdapterDigest, stored: StoredVersion) -> Ingested:
        pair, size_bytes = pair_of(stored.files), stored.size_bytes
        if pair is None:
            raise corrupt(digest, "it holds other files than an adapter has")
        config, weights = (stored.files[name] for name in pair)
        try:
            return self.ingest.read(config, weights, size_bytes=size_bytes, files=pair)
        except InvalidAdapter:
            if stored.size_bytes != size_bytes:
                raise corrupt(digest, "its files changed while they were read") from None
            raise

    def read_staged(self, staged: StagedVersion) -> Ingested:
        """Read and check an adapter that is not stored yet; blocks on the disk."""
        pair = pair_of(file.name for file in staged.files)
        assert pair is not None, staged.files
        with storage_errors(), staged.open(pair.config) as config, staged.open(pair.weights) as weights:
            return self.ingest.read(config, weights, size_bytes=staged.size_bytes, files=pair)

    def keep(self, digest: AdapterDigest, packed: PackedAdapter) -> None:
        with self._lock:
            self.host.put(digest, packed)

    def drop(self, digest: AdapterDigest) -> int:
        """Drop the host's copy and the results of loads requested before; return the freed bytes."""
        with self._lock:
            for load in self._loads.values():
                load.is_kept = load.is_kept and load.digest != digest
            return self.host.drop(digest)

    def _ended(self, future: "Future[PackedAdapter]") -> None:
        with self._lock:
            del self._loads[future]

    def _load(self, load: _Load) -> PackedAdapter:
        try:
            with self.metrics.adapter_load_seconds.time():
                with self._lock:
                    packed = self.host.get(load.digest)
                if packed is None:
                    packed = self.read(load.digest).packed
                    with self._lock:
                        if load.is_kept:
                            self.host.put(load.digest, packed)
                return packed
        except WeftError:
            raise
        except Exception:
            _log.exception("loading an adapter failed")
            raise WeftError("INTERNAL", "internal error") from None
