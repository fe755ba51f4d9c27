"""Load adapters from disk to host memory: worker threads read them, and the host cache keeps them."""

import logging
import threading
from concurrent.futures import Executor, Future

from weft.adapters.host import HostCache
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.ingest import Ingest, Ingested
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.store import AdapterStore
from weft.adapters.versions import StagedVersion, corrupt
from weft.errors import WeftError, draining_error
from weft.metrics import Metrics
from weft.v1.adapter_files import pair_of

_log = logging.getLogger(__name__)


class AdapterLoader:
    """Host copies of stored adapters. Any thread may call it. workers: the threads that read and parse."""

    def __init__(
        self, store: AdapterStore, ingest: Ingest, host: HostCache, *, workers: Executor, metrics: Metrics
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._host = host
        self._workers = workers
        self._metrics = metrics
        self._tickets: dict[AdapterDigest, object] = {}  # of loads whose result may be kept
        self._running: dict[Future[PackedAdapter], AdapterDigest] = {}
        self._lock = threading.Lock()

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._host

    def request(self, digest: AdapterDigest) -> "Future[PackedAdapter]":
        """Return a future that ends with the packed adapter, or with WeftError."""
        with self._lock:
            ticket = self._tickets.setdefault(digest, object())
            try:
                load = self._workers.submit(self._load, digest, ticket)
            except RuntimeError:  # raised by an executor that was shut down
                load = Future()
                load.set_exception(draining_error())
            self._running[load] = digest
        load.add_done_callback(self._ended)
        return load

    def running(self, digest: AdapterDigest) -> "list[Future[PackedAdapter]]":
        """Return the loads of a digest that have not ended; the store cannot remove a version that is being read."""
        with self._lock:
            return [load for load, loaded in self._running.items() if loaded == digest]

    def read(self, digest: AdapterDigest) -> Ingested:
        """Read and check a stored adapter; blocks on the disk."""
        with self._store.open_version(digest) as stored:
            pair = pair_of(stored.files)
            if pair is None:
                raise corrupt(digest, "it holds other files than an adapter has")
            config, weights = (stored.files[name] for name in pair)
            return self._ingest.read(config, weights, size_bytes=stored.size_bytes, files=pair)

    def read_staged(self, staged: StagedVersion) -> Ingested:
        """Read and check an adapter that is not stored yet; blocks on the disk."""
        pair = pair_of(file.name for file in staged.files)
        assert pair is not None, staged.files
        with staged.open(pair.config) as config, staged.open(pair.weights) as weights:
            return self._ingest.read(config, weights, size_bytes=staged.size_bytes, files=pair)

    def keep(self, digest: AdapterDigest, packed: PackedAdapter) -> None:
        self._host.put(digest, packed)

    def drop(self, digest: AdapterDigest) -> int:
        """Drop the host's copy and the results of loads requested before; return the freed bytes."""
        with self._lock:
            self._tickets.pop(digest, None)
            return self._host.drop(digest)

    def _ended(self, load: "Future[PackedAdapter]") -> None:
        with self._lock:
            del self._running[load]

    def _load(self, digest: AdapterDigest, ticket: object) -> PackedAdapter:
        try:
            with self._metrics.adapter_load_seconds.time():
                packed = self._host.get(digest)
                if packed is None:
                    packed = self.read(digest).packed
                    with self._lock:
                        if self._tickets.get(digest) is ticket:
                            self._host.put(digest, packed)
                return packed
        except WeftError:
            raise
        except Exception:
            _log.exception("loading an adapter failed")
            raise WeftError("INTERNAL", "internal error") from None
        finally:
            with self._lock:
                if self._tickets.get(digest) is ticket:
                    del self._tickets[digest]
