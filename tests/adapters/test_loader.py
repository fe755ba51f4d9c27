"""Loads beside the engine: their results, and what the host cache keeps and must not keep."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, cast

import pytest
from tests.engine.fakes import FakeAdapter

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.ingest import Ingested
from weft.adapters.loader import AdapterLoader, HostCache
from weft.adapters.registry import AdapterInfo
from weft.errors import DataLoss, Unavailable, WeftError
from weft.metrics import Metrics

A, B = FakeAdapter(1), FakeAdapter(2)


class Worker(Executor):
    """A worker thread that the test steps."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.is_shut_down = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.is_shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def work(self) -> None:
        while self.jobs:
            future, job = self.jobs.pop(0)
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)


class Disk:
    """A loader over a worker, and files in place of the store's, which `test_store.py` reads for real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker = Worker()
        self.host = HostCache(1 << 20)
        self.reads: list[AdapterDigest] = []
        self.during_read: Callable[[], object] = lambda: None
        nothing = cast(Any, None)
        self.loader = AdapterLoader(
            store=nothing, ingest=nothing, host=self.host, workers=self.worker, metrics=Metrics()
        )
        monkeypatch.setattr(self.loader, "read", self._read)

    def _read(self, digest: AdapterDigest) -> Ingested:
        self.reads.append(digest)
        self.during_read()
        adapter = next(adapter for adapter in (A, B) if adapter.digest == digest)
        return Ingested(AdapterInfo(), adapter.packed())


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_packed_adapter_is_read_once_and_then_comes_from_the_host(disk: Disk) -> None:
    futures = [disk.loader.request(A.digest), disk.loader.request(A.digest)]
    disk.worker.work()
    futures.append(disk.loader.request(A.digest))
    disk.worker.work()
    assert disk.reads == [A.digest]
    first, *others = (future.result(timeout=0) for future in futures)
    assert all(other is first for other in others)
    assert A.digest in disk.loader
    assert disk.loader.drop(A.digest) == first.size_bytes
    assert A.digest not in disk.loader


@pytest.mark.parametrize("when", ["queued", "reading"])
def test_what_was_dropped_on_its_way_is_not_kept(disk: Disk, when: str) -> None:
    """Otherwise nothing would ever drop it. The caller still gets its packed adapter."""
    future = disk.loader.request(A.digest)
    if when == "queued":
        disk.loader.drop(A.digest)
    else:
        disk.during_read = lambda: disk.loader.drop(A.digest)
    assert disk.loader.running(A.digest) == [future]
    assert disk.loader.running(B.digest) == []
    disk.worker.work()
    assert future.result(timeout=0)
    assert A.digest not in disk.loader
    assert disk.loader.running(A.digest) == [], "its files are closed"


def test_a_load_after_the_drop_is_kept(disk: Disk) -> None:
    disk.loader.request(A.digest)
    disk.loader.drop(A.digest)
    disk.loader.request(A.digest)
    disk.worker.work()
    assert A.digest in disk.loader


def test_a_failed_load_says_why_and_the_next_one_reads_again(disk: Disk) -> None:
    def fail() -> None:
        raise DataLoss("BLOB_CORRUPT", "the stored files changed")

    disk.during_read = fail
    future = disk.loader.request(A.digest)
    disk.worker.work()
    assert isinstance(future.exception(timeout=0), DataLoss)
    assert A.digest not in disk.loader
    disk.during_read = lambda: None
    future = disk.loader.request(A.digest)
    disk.worker.work()
    assert future.result(timeout=0)
    assert A.digest in disk.loader


@pytest.mark.usefixtures("caplog")
def test_a_bug_ends_the_load_as_internal_and_tells_nothing(disk: Disk) -> None:
    disk.during_read = lambda: {}["/secret/path"]
    future = disk.loader.request(A.digest)
    disk.worker.work()
    error = future.exception(timeout=0)
    assert isinstance(error, WeftError)
    assert (error.reason, error.message) == ("INTERNAL", "internal error")


def test_after_the_end_a_load_is_refused(disk: Disk) -> None:
    disk.worker.is_shut_down = True
    error = disk.loader.request(A.digest).exception(timeout=0)
    assert isinstance(error, Unavailable)
    assert error.reason == "DRAINING"


def test_many_threads_leave_the_books_right(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {one.digest: one.packed() for one in (FakeAdapter(1 + number, units=1 + number) for number in range(6))}
    digests = list(contents)
    most = 3 * contents[digests[3]].size_bytes
    nothing, host = cast(Any, None), HostCache(most)
    with ThreadPoolExecutor(2) as workers:
        loader = AdapterLoader(store=nothing, ingest=nothing, host=host, workers=workers, metrics=Metrics())
        monkeypatch.setattr(loader, "read", lambda digest: Ingested(AdapterInfo(), contents[digest]))

        def work(seed: int) -> None:
            for step in range(300):
                digest = digests[(step * (2 * seed + 1)) % 6]
                if step % 3 == 0:
                    loader.drop(digest)
                else:
                    loader.keep(digest, contents[digest])
                loader.request(digest)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    kept = [digest for digest in digests if digest in loader]
    assert host.used_bytes == sum(contents[digest].size_bytes for digest in kept) <= most
    for digest in kept:
        loader.drop(digest)
    assert host.used_bytes == 0
