"""A catalog of many ids: what a start, a change and a listing cost, and a start that nothing in the store stops.

WEFT_CATALOG_IDS sets the number of ids.
"""

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.reliability import large
from tests.reliability.pair import ACTIVE, BASE, DEMO, digest, source
from tests.server.live import WAIT_S, Client, LiveServer, Loop, refused, wait_until
from weft.adapters import catalog_index
from weft.adapters import store as store_module
from weft.adapters.catalog import manifest_path
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.ingest import Ingested
from weft.adapters.loader import AdapterLoader
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits, EngineConfig, ModelConfig, ServerConfig, WeftConfig
from weft.v1 import adapter_pb2, adapter_service_pb2

NUM_IDS = int(os.environ.get("WEFT_CATALOG_IDS", "2000"))
SLICE_S_MAX = 0.010  # of the event loop's time, for one callback
FAILED, LOADING = adapter_pb2.ADAPTER_STATE_FAILED, adapter_pb2.ADAPTER_STATE_LOADING


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    servers = Loop()
    yield servers
    servers.close()


def configured(store: Path) -> WeftConfig:
    return WeftConfig(
        model=ModelConfig(path=BASE, device="cpu", num_threads=1),
        store=store,
        allowed_sources=(DEMO,),
        engine=EngineConfig(num_kv_blocks=100, max_model_len=256),
        server=ServerConfig(port=0, metrics_port=0, drain_timeout_s=5.0),
    )


@pytest.fixture(scope="module")
def small(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server with a few adapters, which tests leave as they found it."""
    live = LiveServer(loop, configured(tmp_path_factory.mktemp("small")))
    for name in ("upper-lora", "caesar-ia3", "zigzag-prefix"):
        live.client.register(name, source(name))
    yield live
    live.stop()


class Slices:
    """The CPU time of every callback of an event loop."""

    def __init__(self, patch: pytest.MonkeyPatch, thread: str = "servers") -> None:
        self.longest_s, self.count = 0.0, 0
        run = asyncio.Handle._run  # pyright: ignore[reportAttributeAccessIssue]

        def timed(handle: asyncio.Handle) -> None:
            begun_s = time.thread_time()
            run(handle)
            if threading.current_thread().name == thread:
                self.count += 1
                self.longest_s = max(self.longest_s, time.thread_time() - begun_s)

        patch.setattr(asyncio.Handle, "_run", timed)


class Reads:
    """Counts the manifests that this process reads."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in (catalog_index, store_module):
            patch.setattr(module, "find_manifest", self._counted(module.find_manifest))

    def _counted(self, real: Callable[..., object]) -> Callable[..., object]:
        def find(*arguments: object) -> object:
            self.count += 1
            return real(*arguments)

        return find


@pytest.fixture(scope="module")
def many(loop: Loop, small: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server that started on many adapters; no file of theirs was read, or the start fails."""
    loader = small.application.lifecycle.loader
    ia3 = loader.read(AdapterDigest(digest("caesar-ia3")))
    root = tmp_path_factory.mktemp("many")
    large.make(root, source("caesar-ia3"), NUM_IDS, info=ia3.info.encode(), checked_for=loader.ingest.checked_for)

    def never(*arguments: object) -> Ingested:
        raise AssertionError("a file was read at the start")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLoader, "read", never)
        live = LiveServer(loop, configured(root))
    yield live
    live.stop()


def test_a_start_reads_manifests_alone(many: LiveServer) -> None:
    """All adapters are in service at once, as they were described; their files are read at the first use."""
    registry = many.application.lifecycle.registry
    assert len(registry) == NUM_IDS
    last = many.client.get(f"many-{NUM_IDS - 1:05}")
    assert (last.state, last.method, last.num_parameters > 0, last.size_bytes > 10_000) == (ACTIVE, "ia3", True, True)
    assert many.client.tokens("many-00001")


def test_a_change_costs_the_same_with_any_number_of_ids(many: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client, versions = many.client, many.config.store / "versions"
    client.register("new", source("upper-lora"))
    reads = Reads(monkeypatch)
    client.register("new", source("caesar-prefix"), replace=True)
    wait_until(lambda: not (versions / digest("upper-lora")).exists())
    client.unregister("new")
    assert not (versions / digest("caesar-prefix")).exists()
    assert reads.count < 30


def test_reads_are_counted(many: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    reads = Reads(monkeypatch)
    AdapterStore(many.config.store, AdapterLimits()).read_catalog()
    assert reads.count == NUM_IDS


def listed_and_watched(client: Client) -> list[str]:
    """Return the ids of every page of a list, which a watch shows too."""
    names, token = [], ""
    while True:
        page = client.list(page_size=1000, page_token=token)
        names += [adapter.adapter_id for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    watch = client.adapters.WatchAdapters(adapter_service_pb2.WatchAdaptersRequest(), timeout=WAIT_S)
    watched = []
    for event in watch:
        if event.change == adapter_service_pb2.ADAPTER_CHANGE_SYNCED:
            break
        watched.append(event.adapter.adapter_id)
    watch.cancel()
    assert watched == names
    return names


def test_listing_and_watching_give_way(many: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the best of three turns, because another program may lengthen a slice of any one."""
    slices, longest_s = Slices(monkeypatch), []
    for _ in range(3):
        slices.longest_s = 0.0
        names = listed_and_watched(many.client)
        assert names == sorted(names)
        assert len(names) == NUM_IDS
        longest_s.append(slices.longest_s)
    assert not many.client.list(state=FAILED).adapters
    assert slices.count > NUM_IDS // 100
    print(f"longest slices {longest_s} s of {slices.count}")
    assert min(longest_s) < SLICE_S_MAX


def test_a_long_slice_is_seen(many: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    slices = Slices(monkeypatch)

    async def work() -> None:
        end_s = time.thread_time() + 2 * SLICE_S_MAX
        while time.thread_time() < end_s:
            pass

    many.loop.run(work())
    assert slices.longest_s > SLICE_S_MAX


def test_a_server_that_waits_reads_nothing(many: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    index = many.application.lifecycle.store.index
    reads = Reads(monkeypatch)
    begun_s = time.thread_time()
    for _ in range(100):
        index.refresh()
    assert time.thread_time() - begun_s < 0.1, "1 ms each"
    assert reads.count == 0


# What the index sees


def test_changes_without_a_log_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those made by hand, and those that a full disk kept from being logged."""
    large.make(tmp_path, source("caesar-ia3"), 5)
    store, other = (AdapterStore(tmp_path, AdapterLimits()) for _ in range(2))
    other.recover()
    other.index.take_changed()
    reads = Reads(monkeypatch)
    path = manifest_path(tmp_path / "catalog", AdapterId("many-00001"))
    path.rename(tmp_path / "kept")
    other.index.refresh()
    assert other.index.take_changed() == {"many-00001"}
    assert other.index.get(AdapterId("many-00001")) is None
    shutil.copy(tmp_path / "kept", path)
    other.index.refresh()
    assert other.index.take_changed() == {"many-00001"}
    assert reads.count == 1, "only what differs is read"
    (tmp_path / "catalog" / ".changes").unlink()
    store.set_pinned(AdapterId("many-00002"), True)
    other.index.refresh()
    assert "many-00002" in other.index.take_changed()


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """On a file system with coarse times, a directory can change without a change of its time."""
    large.make(tmp_path, source("caesar-ia3"), 3)
    store, other = (AdapterStore(tmp_path, AdapterLimits()) for _ in range(2))
    other.recover()
    other.index.take_changed()
    before = (tmp_path / "catalog").stat()
    for number in range(3):
        store.set_pinned(AdapterId(f"many-{number:05}"), True)
        os.utime(tmp_path / "catalog", ns=(before.st_atime_ns, before.st_mtime_ns))
        other.index.refresh()
        assert other.index.take_changed() == {f"many-{number:05}"}


def test_a_long_log_begins_again(tmp_path: Path) -> None:
    large.make(tmp_path, source("caesar-ia3"), 3)
    log = tmp_path / "catalog" / ".changes"
    store, other = (AdapterStore(tmp_path, AdapterLimits()) for _ in range(2))
    other.recover()
    with log.open("ab") as file:
        file.write(b"=many-00000\n" * (1 << 17))
    other.index.refresh()
    other.index.take_changed()
    store.remove(AdapterId("many-00001"))
    assert log.stat().st_size < 200
    other.index.refresh()
    assert other.index.take_changed() == {"many-00001"}
    assert other.index.catalog() == store.read_catalog()


# Restore


def test_a_bad_adapter_does_not_stop_the_others(
    loop: Loop, small: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reading it raises; adapters that were checked for other limits are read, one after another."""
    shutil.copytree(small.config.store, tmp_path / "store")
    config = replace(configured(tmp_path / "store"), adapters=AdapterLimits(rank_max=64))
    read, may_read = AdapterLoader.read, threading.Event()
    faults = {digest("caesar-ia3"): KeyError("a bug"), digest("upper-lora"): OSError(5, "Input/output error")}

    def failing(loader: AdapterLoader, one: AdapterDigest) -> Ingested:
        assert may_read.wait(WAIT_S)
        if one in faults:
            raise faults[one]
        return read(loader, one)

    monkeypatch.setattr(AdapterLoader, "read", failing)
    live = LiveServer(loop, config)
    try:
        client = live.client
        assert {adapter.state for adapter in client.list().adapters} == {LOADING}
        refused(lambda: client.generate("zigzag-prefix"), "FAILED_PRECONDITION", "ADAPTER_NOT_READY", retry=True)
        refused(lambda: client.register("upper-lora", source("upper-ia3")), "ALREADY_EXISTS", "ADAPTER_EXISTS")
        may_read.set()
        wait_until(lambda: client.get("zigzag-prefix").state == ACTIVE)
        assert len(client.tokens("zigzag-prefix")) == 8
        wait_until(lambda: not client.list(state=LOADING).adapters)
        assert {name: client.get(name).state_reason for name in ("caesar-ia3", "upper-lora")} == {
            "caesar-ia3": "INTERNAL",
            "upper-lora": "INTERNAL",
        }
        client.unregister("caesar-ia3")
        assert client.register("upper-lora", source("upper-lora")).adapter.state == ACTIVE
    finally:
        may_read.set()
        live.stop()
    # The next start knows this description, and reads nothing.
    monkeypatch.setattr(AdapterLoader, "read", lambda *arguments: pytest.fail("a file was read at the start"))
    live = LiveServer(loop, config)
    states = {adapter.adapter_id: adapter.state for adapter in live.client.list().adapters}
    live.stop()
    assert states == {"upper-lora": ACTIVE, "zigzag-prefix": ACTIVE}


def test_an_adapter_is_unregistered_while_it_is_read(
    loop: Loop, small: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small.config.store, tmp_path / "store")
    config = replace(configured(tmp_path / "store"), adapters=AdapterLimits(rank_max=65))
    read, may_read = AdapterLoader.read, threading.Event()

    def slow(loader: AdapterLoader, one: AdapterDigest) -> Ingested:
        assert may_read.wait(WAIT_S)
        return read(loader, one)

    monkeypatch.setattr(AdapterLoader, "read", slow)
    live = LiveServer(loop, config)
    try:
        live.client.unregister("upper-lora")
        may_read.set()
        wait_until(lambda: not live.client.list(state=LOADING).adapters)
        assert [adapter.adapter_id for adapter in live.client.list().adapters] == ["caesar-ia3", "zigzag-prefix"]
    finally:
        may_read.set()
        live.stop()


# A hung engine


def test_unregistering_does_not_wait_for_a_hung_engine(small: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call says so in time; the adapter is out of the catalog, and a second call finishes."""
    client = small.client
    client.register("held", source("upper-ia3"))
    monkeypatch.setattr(small.application.lifecycle, "release_timeout_s", 0.3)
    with small.gate.held():
        stream = client.stream("held", 50)
        wait_until(lambda: client.get("held").in_flight_requests == 1)
        wait_until(lambda: small.gate._waiting)
        for _ in range(2):
            begun_s = time.monotonic()
            refused(
                lambda: client.unregister("held", mode="UNREGISTER_MODE_CANCEL"),
                "UNAVAILABLE",
                "ENGINE_STALLED",
                "0.3 s",
                retry=True,
            )
            assert time.monotonic() - begun_s < 5
        assert not manifest_path(small.config.store / "catalog", AdapterId("held")).exists()
        refused(lambda: client.generate("held"), "FAILED_PRECONDITION", "ADAPTER_DRAINING")
        small.gate.open()
        try:
            client.unregister("held")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # pyright: ignore  # noqa: PT017  it was fast
    refused(lambda: stream, "ABORTED", "ADAPTER_UNREGISTERED")
    refused(lambda: client.get("held"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert client.register("held", source("upper-ia3")).adapter.state == ACTIVE
    client.unregister("held")
