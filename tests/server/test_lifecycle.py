"""Adapters that come, change and go while requests run, over a real channel and with a real model.

Every answer is compared token for token with that of the same content alone, on an idle server and a cold cache.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.server.conftest import Sources
from tests.server.live import WAIT_S, LiveServer, Loop, Running, refused, wait_until
from weft.adapters.identifiers import AdapterDigest as Digest
from weft.adapters.identifiers import AdapterId
from weft.adapters.ingest import CONFIG_FILE, Ingest
from weft.adapters.registry import AdapterInfo, Change, Version
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.adapters.store import AdapterStore
from weft.api.admission import Admission
from weft.api.prompt import PromptEncoder
from weft.api.watch import Watches
from weft.config import WeftConfig
from weft.engine.request import Request
from weft.errors import Unavailable
from weft.v1 import adapter_pb2, adapter_service_pb2

CREATED, REPLACED, UNCHANGED = (
    adapter_service_pb2.REGISTER_OUTCOME_CREATED,
    adapter_service_pb2.REGISTER_OUTCOME_REPLACED,
    adapter_service_pb2.REGISTER_OUTCOME_UNCHANGED,
)
ACTIVE, FAILED, QUARANTINED, DRAINING = (
    adapter_pb2.ADAPTER_STATE_ACTIVE,
    adapter_pb2.ADAPTER_STATE_FAILED,
    adapter_pb2.ADAPTER_STATE_QUARANTINED,
    adapter_pb2.ADAPTER_STATE_DRAINING,
)
DEVICE, HOST, DISK = (
    adapter_pb2.ADAPTER_RESIDENCY_DEVICE,
    adapter_pb2.ADAPTER_RESIDENCY_HOST,
    adapter_pb2.ADAPTER_RESIDENCY_DISK,
)
LONG = 24  # tokens of a request that a test interrupts


@pytest.fixture(scope="module")
def alone(_server: LiveServer, sources: Sources) -> Callable[[str], list[int]]:
    """Return a function for the answer of a source alone, under an id of its own."""
    answers: dict[str, list[int]] = {}

    def ask(name: str) -> list[int]:
        if name not in answers:
            _server.client.register("alone", sources(name))
            answers[name] = _server.client.tokens("alone", LONG, cache_salt=f"alone-{name}")
            _server.client.unregister("alone")
        return answers[name]

    return ask


# -- register and replace ---------------------------------------------------------------------------------------------


def test_register_replace_and_compare_and_swap(server: LiveServer, sources: Sources) -> None:
    client = server.client
    first = client.register("one", sources("lora-2"))
    assert first.outcome == CREATED
    assert (first.adapter.state, first.adapter.method, first.adapter.rank) == (ACTIVE, "lora", 8)
    digest = first.adapter.digest
    for fields in ({}, {"replace": True}, {"expected_digest": digest}, {"expected_digest": ""}):
        again = client.register("one", sources("lora-2"), **fields)
        assert (again.outcome, again.adapter.digest) == (UNCHANGED, digest)
    assert client.register("two", sources("lora-2")).adapter.digest == digest, "content has one name"
    checked = client.register("one", sources("ia3-2"), replace=True, validate_only=True)
    assert (checked.outcome, checked.adapter.method) == (REPLACED, "ia3")
    assert client.get("one").digest == digest
    swapped = client.register("one", sources("ia3-2"), replace=True, expected_digest=digest)
    assert swapped.outcome == REPLACED
    assert swapped.adapter.digest == checked.adapter.digest != digest
    refused(
        lambda: client.register("one", sources("lora-2"), replace=True, expected_digest=digest),
        "ABORTED",
        "VERSION_CONFLICT",
    )
    refused(
        lambda: client.register("three", sources("lora-3"), content_digest=digest),
        "INVALID_ARGUMENT",
        "CHECKSUM_MISMATCH",
    )
    for name in ("one", "two"):
        client.unregister(name)


def test_a_running_stream_keeps_its_digest(
    server: LiveServer, sources: Sources, alone: Callable[[str], list[int]]
) -> None:
    """Although its adapter is replaced twice, a request ends with the content it began with; the next gets the new."""
    client = server.client
    wanted = {name: alone(name) for name in ("lora-2", "ia3-2", "prefix-2")}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3, "a swapped adapter could not be told"
    old = client.register("swapped", sources("lora-2")).adapter.digest
    with server.gate.held():
        stream = client.stream("swapped", LONG)
        server.gate.let(5)
        middle = client.register("swapped", sources("ia3-2"), replace=True).adapter.digest
        assert [d.digest for d in client.get("swapped").draining_versions] == [old]
        assert client.get("swapped").draining_versions[0].in_flight_requests == 1
        second = client.stream("swapped", LONG)
        server.gate.let(5)
        client.register("swapped", sources("prefix-2"), replace=True)
        third = client.stream("swapped", LONG)
        refused(lambda: client.generate(f"swapped@{middle}"), "FAILED_PRECONDITION", "ADAPTER_DRAINING", middle)
    answers = [running.result() for running in (stream, second, third)]
    assert [answer.tokens for answer in answers] == [wanted["lora-2"], wanted["ia3-2"], wanted["prefix-2"]]
    assert answers[0].digest == old
    assert answers[1].digest == middle
    # Once no request holds it, an old version is gone: from memory, from disk, and for requests.
    wait_until(lambda: not client.get("swapped").draining_versions)
    refused(lambda: client.generate(f"swapped@{old}"), "NOT_FOUND", "ADAPTER_NOT_FOUND", old)
    wait_until(lambda: not (server.config.store / "versions" / old).exists())
    client.unregister("swapped")


def test_the_comparison_sees_a_swapped_adapter(
    server: LiveServer, sources: Sources, alone: Callable[[str], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of every test here that compares tokens: leases that follow the id instead of the content."""
    client = server.client
    client.register("swapped", sources("lora-2"))
    other = client.register("other", sources("lora-3")).adapter.digest
    request = Admission.request

    def wrong(*arguments: object, **options: object) -> Request:
        made = request(*arguments, **options)  # pyright: ignore[reportArgumentType]
        return replace(made, adapters=tuple(use._replace(digest=other) for use in made.adapters))

    wanted = alone("lora-2")
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "request", wrong)
        assert client.tokens("swapped", LONG, cache_salt="wrong") != wanted
        # The key of its KV names the expected content, so requests that share it get the wrong tokens too.
        client.tokens("swapped", LONG, cache_salt="shared")
    assert client.tokens("swapped", LONG, cache_salt="shared") != wanted
    assert client.tokens("swapped", LONG) == wanted
    for name in ("swapped", "other"):
        client.unregister(name)


def test_an_id_with_a_digest_is_exact(server: LiveServer, sources: Sources) -> None:
    client = server.client
    digest = client.register("exact", sources("lora-2")).adapter.digest
    answer = client.generate(f"exact@{digest}")
    assert answer.digest == digest
    assert answer.finish.effective_adapters[0].adapter_id == "exact"
    assert client.get(f"exact@{digest}").digest == digest
    client.register("exact", sources("lora-3"), replace=True)
    for call in (client.generate, client.get):
        refused(lambda call=call: call(f"exact@{digest}"), "NOT_FOUND", "ADAPTER_NOT_FOUND", digest)
    for malformed in ("exact@", "exact@abc", f"exact@{digest[:-1]}", f"exact@{digest.upper()}"):
        refused(lambda name=malformed: client.generate(name), "INVALID_ARGUMENT", "ID_INVALID")
    client.unregister("exact")


def test_kv_same_id_new_digest_equals_cold(
    server: LiveServer, sources: Sources, alone: Callable[[str], list[int]]
) -> None:
    """An id that is removed and registered again with other content answers as on a cold cache."""
    client = server.client
    prompt = "A prompt that is long enough to fill some blocks of the cache with its keys. " * 2
    client.register("cold", sources("lora-2"))
    old = client.generate("cold", LONG, text=prompt)
    warm = client.generate("cold", LONG, text=prompt)
    assert warm.finish.usage.cached_prompt_tokens > 100, "the cache would not be hit anyway"
    assert warm.tokens == old.tokens
    client.unregister("cold")
    client.register("cold", sources("lora-3"))
    cold = client.generate("cold", LONG, cache_salt="never used before", text=prompt)
    new = client.generate("cold", LONG, text=prompt)
    assert new.finish.usage.cached_prompt_tokens == 0
    assert new.tokens == cold.tokens != old.tokens
    client.register("cold", sources("lora-2"), replace=True)
    assert client.generate("cold", LONG, text=prompt).tokens == old.tokens
    client.unregister("cold")


# -- unregister in every state of a request ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["UNREGISTER_MODE_DRAIN", "UNREGISTER_MODE_CANCEL"])
@pytest.mark.parametrize("state", ["accepting", "queued", "prefilling", "decoding", "finished"])
def test_unregister_after_each_lifecycle_shape(
    state: str, mode: str, tight: LiveServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every state of the request: it finishes or fails, the call returns, and nothing of the adapter is left."""
    client, blocks = tight.client, tight.application.engine.blocks
    client.register("leaving", sources("lora-2"))
    prompt = "A prompt of more tokens than one step computes, so that it is caught in the middle."
    wanted = client.tokens("leaving", LONG, cache_salt="alone", text=prompt)
    running: list[Running] = []
    go_on = threading.Event()
    encode = PromptEncoder.encode

    async def slowly(*arguments: object) -> list[int]:
        await asyncio.to_thread(go_on.wait, WAIT_S)
        return await encode(*arguments)  # pyright: ignore[reportArgumentType]

    with tight.gate.held(), monkeypatch.context() as patch, ThreadPoolExecutor() as threads:
        if state == "queued":  # two others are all that run
            running += [client.stream(None, 4), client.stream(None, 4)]
            wait_until(lambda: tight.application.requests.admission.num_requests == 2)
        if state == "accepting":
            patch.setattr(PromptEncoder, "encode", slowly)
        stream = client.stream("leaving", LONG, text=prompt)
        wait_until(lambda: client.get("leaving").in_flight_requests == 1)
        if state == "prefilling":
            tight.gate.let(3)
            assert stream.tokens == []
        elif state == "decoding":
            tight.gate.let(14)
            wait_until(lambda: len(stream.tokens) >= 2)
        elif state == "finished":
            tight.gate.open()
            assert stream.result().tokens == wanted
        removing = threads.submit(client.unregister, "leaving", mode=mode)
        if state != "finished":
            wait_until(lambda: client.get("leaving").state == DRAINING)
            refused(lambda: client.generate("leaving"), "FAILED_PRECONDITION", "ADAPTER_DRAINING")
        go_on.set()
        tight.gate.open()
        removed = removing.result(WAIT_S)
    if mode == "UNREGISTER_MODE_DRAIN" or state == "finished":
        assert removed.cancelled_requests == 0
        assert stream.result().tokens == wanted
    else:
        assert removed.cancelled_requests == 1
        refused(lambda: stream, "ABORTED", "ADAPTER_UNREGISTERED", "leaving", retry=False)
        assert stream.tokens == wanted[: len(stream.tokens)]
    assert removed.freed_host_bytes > 0
    for other in running:
        assert len(other.result().tokens) == 4
    refused(lambda: client.get("leaving"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    digest = _digest(sources("lora-2"), tight)
    memory = tight.application.lifecycle.memory
    assert memory.place_of(digest).value == "disk", "a copy is left in memory"
    assert not any(digest in digests for digests in blocks._digests_of.values()), "cached keys are left"


def test_a_drain_ends_at_its_timeout(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.register("leaving", sources("lora-2"))
    with tight.gate.held(), ThreadPoolExecutor() as threads:
        stream = client.stream("leaving", LONG)
        tight.gate.let(8)
        removing = threads.submit(client.unregister, "leaving", timeout={"nanos": 50_000_000})
        wait_until(lambda: client.get("leaving").state == DRAINING)
        threading.Event().wait(0.1)
        tight.gate.open()
        assert removing.result(WAIT_S).cancelled_requests == 1
    refused(lambda: stream, "ABORTED", "ADAPTER_UNREGISTERED")


def test_a_removal_goes_on_without_its_caller(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.register("leaving", sources("lora-2"))
    with tight.gate.held():
        stream = client.stream("leaving", 8)
        wait_until(lambda: client.get("leaving").in_flight_requests == 1)
        request = adapter_service_pb2.UnregisterAdapterRequest(adapter_id="leaving")
        call = client.adapters.UnregisterAdapter.future(request)
        wait_until(lambda: client.get("leaving").state == DRAINING)
        call.cancel()
    assert len(stream.result().tokens) == 8
    wait_until(lambda: "leaving" not in {adapter.adapter_id for adapter in client.list().adapters})


def test_an_adapter_that_is_removed_while_it_is_loaded_leaves_nothing(
    server: LiveServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow, the request is cancelled, the adapter is removed: data that comes later is not kept."""
    client, memory = server.client, server.application.lifecycle.memory
    digest = Digest(client.register("late", sources("lora-2")).adapter.digest)
    client.unload("late")
    reading, go_on = threading.Event(), threading.Event()
    read = Ingest.read

    def slowly(*arguments: object, **options: object) -> object:
        reading.set()
        assert go_on.wait(WAIT_S)
        return read(*arguments, **options)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch, ThreadPoolExecutor() as threads:
        patch.setattr(Ingest, "read", slowly)
        stream = client.stream("late", 4)
        assert reading.wait(WAIT_S)
        removing = threads.submit(client.unregister, "late", mode="UNREGISTER_MODE_CANCEL")
        refused(lambda: stream, "ABORTED", "ADAPTER_UNREGISTERED")
        go_on.set()
        removing.result(WAIT_S)
    client.generate("lora-1", 2)  # whatever was still on its way has arrived by now
    wait_until(lambda: memory.place_of(digest).value == "disk")


# -- residency --------------------------------------------------------------------------------------------------------


def test_load_unload_and_pin(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.unload("lora-1")
    client.register("moved", sources("lora-2"))
    assert client.get("moved").residency == HOST
    assert client.unload("moved").residency == DISK
    assert client.get("moved").resident_bytes == 0
    assert client.load("moved", residency="ADAPTER_RESIDENCY_HOST").residency == HOST
    loaded = client.load("moved")
    assert (loaded.residency, loaded.pinned) == (DEVICE, False)
    assert client.load("moved", residency="ADAPTER_RESIDENCY_HOST").residency == DEVICE, "a faster place is kept"
    pinned = client.load("moved", pin=True)
    assert (pinned.residency, pinned.pinned) == (DEVICE, True)
    assert client.unload("moved", residency="ADAPTER_RESIDENCY_HOST").residency == HOST
    assert not client.get("moved").pinned
    before = client.tokens("moved", 4)
    assert client.get("moved").residency == DEVICE, "a request brings it back"
    # A pinned adapter stays when others need room; the one that was used longest ago leaves.
    client.load("moved", pin=True)
    for name in ("lora-3", "lora-4", "lora-5"):
        client.register(name, sources(name))
        client.generate(name, 2)
        places = {adapter.adapter_id: adapter.residency for adapter in client.list().adapters}
        assert places["moved"] == places[name] == DEVICE
        assert sum(place == DEVICE for place in places.values()) == 2
    assert client.register("moved", sources("lora-2"), pin=False).adapter.pinned, "only LoadAdapter removes a pin"
    replaced = client.register("moved", sources("lora-6"), replace=True).adapter
    assert (replaced.pinned, replaced.residency) == (True, DEVICE), "a pin belongs to the id"
    client.register("moved", sources("lora-2"), replace=True)
    assert client.tokens("moved", 4) == before
    assert not client.load("moved", pin=False).pinned
    for name in ("moved", "lora-3", "lora-4", "lora-5"):
        client.unregister(name)


def test_an_adapter_in_use_cannot_be_unloaded(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.load("lora-1", pin=True)
    with tight.gate.held():
        stream = client.stream("lora-1", 8)
        tight.gate.let(6)
        refused(lambda: client.unload("lora-1"), "FAILED_PRECONDITION", "ADAPTER_IN_USE", "lora-1", retry=True)
        assert client.get("lora-1").pinned, "nothing was changed"
        client.register("twin", sources("lora-1"))  # the same content under another id
        refused(lambda: client.unload("twin"), "FAILED_PRECONDITION", "ADAPTER_IN_USE", retry=True)
        client.unregister("twin")
        assert client.get("lora-1").residency == DEVICE
    assert len(stream.result().tokens) == 8
    client.unload("lora-1")


def test_a_blob_that_rots_on_disk(server: LiveServer, sources: Sources) -> None:
    """Row 93: DATA_LOSS for that adapter alone, until it is registered again."""
    client = server.client
    path = sources("lora-2")
    digest = client.register("rotten", path).adapter.digest
    before = client.tokens("rotten", 4)
    blob = server.config.store / "versions" / digest / WEIGHTS_FILE
    blob.chmod(0o600)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    assert client.tokens("rotten", 4) == before, "what is in memory is still good"
    client.unload("rotten")
    for call in (client.generate, client.stream, client.load):
        refused(lambda call=call: call("rotten"), "DATA_LOSS", "BLOB_CORRUPT", retry=False)
    adapter = client.get("rotten")
    assert (adapter.state, adapter.state_reason) == (FAILED, "BLOB_CORRUPT")
    server.check_well()
    assert client.register("rotten", path).adapter.state == ACTIVE, "registering it again repairs it"
    client.unload("rotten")
    assert client.tokens("rotten", 4) == before
    client.unregister("rotten")


def test_a_store_that_cannot_be_read_for_a_moment_fails_no_adapter(
    server: LiveServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.client
    client.register("shelved", sources("lora-2"))
    client.unload("shelved")

    def unreadable(*arguments: object, **options: object) -> object:
        raise Unavailable("STORE_UNAVAILABLE", "the adapter store cannot be used (EIO)", retry_after_s=1.0)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "open_version", unreadable)
        for call in (client.generate, client.load):
            refused(lambda call=call: call("shelved"), "UNAVAILABLE", "STORE_UNAVAILABLE", retry=True)
        patch.setattr(AdapterStore, "commit", unreadable)
        refused(lambda: client.register("new", sources("lora-3"), pin=True), "UNAVAILABLE", "STORE_UNAVAILABLE")
        patch.setattr(AdapterStore, "remove", unreadable)
        refused(lambda: client.unregister("shelved"), "UNAVAILABLE", "STORE_UNAVAILABLE")
        server.check_well()
    refused(lambda: client.get("new"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert client.get("shelved").state == ACTIVE
    assert client.tokens("shelved", 2)
    client.unregister("shelved")


# -- watching and listing ---------------------------------------------------------------------------------------------


class Watcher:
    """A watch that a thread is reading."""

    def __init__(self, server: LiveServer) -> None:
        self._call = server.client.adapters.WatchAdapters(adapter_service_pb2.WatchAdaptersRequest(), timeout=WAIT_S)
        self.events: list[tuple[str, str]] = []
        self.states: dict[str, adapter_pb2.Adapter] = {}
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._call:
                change = adapter_service_pb2.AdapterChange.Name(event.change).removeprefix("ADAPTER_CHANGE_")
                self.states[event.adapter.adapter_id] = event.adapter
                self.events.append((change, event.adapter.adapter_id))
        except grpc.RpcError as error:
            self.error = error

    def changes_of(self, adapter_id: str) -> list[str]:
        return [change for change, of in self.events if of == adapter_id]

    def close(self) -> None:
        self._call.cancel()
        self._thread.join(WAIT_S)


def test_watch_tells_what_is_there_and_what_changes(server: LiveServer, sources: Sources) -> None:
    client, watcher = server.client, Watcher(server)
    wait_until(lambda: ("SYNCED", "") in watcher.events)
    synced = watcher.events.index(("SYNCED", ""))
    assert watcher.events[:synced] == [("EXISTING", name) for name in ("ia3-1", "lora-1", "prefix-1")]
    client.register("seen", sources("lora-2"))
    wait_until(lambda: watcher.changes_of("seen") == ["ADDED"])
    new = client.register("seen", sources("lora-3"), replace=True).adapter.digest
    wait_until(lambda: watcher.states["seen"].digest == new)
    client.load("seen", pin=True)
    wait_until(lambda: watcher.states["seen"].pinned and watcher.states["seen"].residency == DEVICE)
    client.unload("seen")
    wait_until(lambda: not watcher.states["seen"].pinned and watcher.states["seen"].residency == DISK)
    client.generate("seen", 1)
    wait_until(lambda: watcher.states["seen"].residency == DEVICE)
    client.unregister("seen")
    wait_until(lambda: watcher.changes_of("seen")[-1] == "REMOVED")
    changes = watcher.changes_of("seen")
    assert set(changes[1:-1]) == {"UPDATED"}
    watcher.close()


def test_a_slow_watcher_gets_the_latest_state_and_costs_no_memory() -> None:
    def version(adapter_id: str) -> Version:
        digest = Digest("0" * 64)
        return Version(adapter_id=AdapterId(adapter_id), digest=digest, info=AdapterInfo(), create_time_s=0.0)

    async def take(watches: Watches) -> list[tuple[str, str]]:
        with watches.watching() as watch:
            watches.put(Change.ADDED, version("a"))
            for _ in range(1000):
                watches.put(Change.UPDATED, version("a"))
                watches.put(Change.UPDATED, version("b"))
            watches.put(Change.REMOVED, version("c"))
            assert len(watch._changes) == 3
            watches.end()
            found = []
            while (event := await watch.next()) is not None:
                change, changed = event
                found.append((change.value, changed.adapter_id))
            return found

    assert asyncio.run(take(Watches())) == [("added", "a"), ("updated", "b"), ("removed", "c")]


def test_list_in_pages_and_by_kind(server: LiveServer) -> None:
    client = server.client
    assert [adapter.adapter_id for adapter in client.list().adapters] == ["ia3-1", "lora-1", "prefix-1"]
    token, found = "", []
    for _ in range(3):
        page = client.list(page_size=1, page_token=token)
        found += [adapter.adapter_id for adapter in page.adapters]
        token = page.next_page_token
    assert (found, token) == (["ia3-1", "lora-1", "prefix-1"], "")
    assert [adapter.adapter_id for adapter in client.list(method="lora").adapters] == ["lora-1"]
    assert not client.list(state=FAILED).adapters
    assert len(client.list(page_size=5000).adapters) == 3


# -- restart ----------------------------------------------------------------------------------------------------------


def test_a_restart_restores_the_catalog(loop: Loop, tight_config: WeftConfig, sources: Sources, tmp_path: Path) -> None:
    """Every adapter keeps its digest and pin; those damaged meanwhile are FAILED, and the server starts.

    No file is read at the start, so a flipped bit shows at the first use.
    """
    config = replace(tight_config, store=tmp_path / "store")
    live = LiveServer(loop, config)
    names = ("fine", "pinned", "rotten", "gone", "torn")
    for number, name in enumerate(names):
        live.client.register(name, sources(f"lora-{number + 1}"), pin=name == "pinned")
    answers = {name: live.client.tokens(name, 4) for name in ("fine", "pinned")}
    digests = {name: live.client.get(name).digest for name in names}
    watcher = Watcher(live)
    wait_until(lambda: ("SYNCED", "") in watcher.events)
    live.stop()
    watcher.close()
    refused(lambda: _raise(watcher.error), "UNAVAILABLE", "DRAINING", retry=True)

    versions, catalog = config.store / "versions", config.store / "catalog"
    blob = versions / digests["rotten"] / WEIGHTS_FILE
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (versions / digests["gone"] / name).unlink()
    (versions / digests["gone"]).rmdir()
    (catalog / "torn.json").write_bytes((catalog / "torn.json").read_bytes()[:40])
    (catalog / "stranger.txt").write_text("what is this")

    live = LiveServer(loop, config)
    try:
        found = {adapter.adapter_id: adapter for adapter in live.client.list().adapters}
        assert {name: adapter.state for name, adapter in found.items()} == {
            "fine": ACTIVE,
            "pinned": ACTIVE,
            "rotten": ACTIVE,
            "gone": FAILED,
            "torn": FAILED,
        }
        refused(lambda: live.client.generate("rotten"), "DATA_LOSS", "BLOB_CORRUPT", digests["rotten"][:12])
        found["rotten"] = live.client.get("rotten")
        assert found["rotten"].state == FAILED
        assert found["gone"].digest == digests["gone"]
        assert found["pinned"].pinned
        wait_until(lambda: live.client.get("pinned").residency == DEVICE)
        assert {name: live.client.tokens(name, 4) for name in answers} == answers
        assert {name: found[name].digest for name in answers} == {name: digests[name] for name in answers}
        reasons = {name: found[name].state_reason for name in ("rotten", "gone", "torn")}
        assert reasons == {"rotten": "BLOB_CORRUPT", "gone": "BLOB_CORRUPT", "torn": "MANIFEST_CORRUPT"}
        refused(lambda: live.client.generate("rotten"), "DATA_LOSS", "BLOB_CORRUPT", "rotten")
        refused(lambda: live.client.generate("torn"), "FAILED_PRECONDITION", "ADAPTER_NOT_READY", "failed", retry=False)
        # Registering them again repairs them; they can also be removed.
        assert live.client.register("rotten", sources("lora-3")).adapter.state == ACTIVE
        assert live.client.register("gone", sources("lora-4")).adapter.state == ACTIVE
        live.client.unregister("torn")
        assert live.client.tokens("gone", 4)
    finally:
        live.stop()
    (catalog / "stranger.txt").unlink()
    live = LiveServer(loop, config)
    try:
        states = {adapter.adapter_id: adapter.state for adapter in live.client.list().adapters}
        assert states == dict.fromkeys(("fine", "pinned", "rotten", "gone"), ACTIVE)
    finally:
        live.stop()


# -- an adapter that makes NaN ----------------------------------------------------------------------------------------


def test_row_61_nan_reaches_nobody_else(tight: LiveServer, sources: Sources, poison: str) -> None:
    """It fails its own requests, changes no token beside or after them, and is quarantined each time."""
    client = tight.client
    prompt = "Words enough to fill more than two blocks of keys and values with them."
    targets = (None, "lora-1")
    alone = {target: client.tokens(target, LONG, cache_salt="alone", text=prompt) for target in targets}
    for turn, target in enumerate((None, "lora-1", None)):
        with tight.gate.held():
            neighbour = client.stream(target, LONG, text=prompt)
            victim = client.stream(poison, LONG, text=prompt)
            wait_until(lambda: tight.application.requests.admission.num_requests == 2)
        refused(lambda victim=victim: victim, "FAILED_PRECONDITION", "ADAPTER_NON_FINITE", retry=False)
        assert neighbour.result().tokens == alone[target], turn
        wait_until(lambda: client.get(poison).state == QUARANTINED)
        if turn < 2:
            assert client.lift(poison).state == ACTIVE
    shared = [step for step in tight.gate.steps[-60:] if step.num_requests == 2]
    assert shared, "they never were in one batch"
    for call in (client.generate, client.load):
        refused(lambda call=call: call(poison), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED", "NON_FINITE", retry=False)
    adapter = client.get(poison)
    assert (adapter.state, adapter.state_reason) == (QUARANTINED, "ADAPTER_NON_FINITE")
    # The blocks that held NaN are reused, and none of it reaches other requests.
    blocks = tight.application.engine.blocks
    assert not any(adapter.digest in digests for digests in blocks._digests_of.values())
    for _ in range(3):
        with ThreadPoolExecutor() as threads:
            tokens = threads.map(lambda target: client.tokens(target, LONG, text=prompt), targets)
            assert dict(zip(targets, tokens, strict=True)) == alone
    # The same content is still refused, other content under the id is accepted.
    source = sources.root / "poison"
    refused(lambda: client.register(poison, source), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED")
    client.register(poison, sources("lora-2"), replace=True)
    assert client.tokens(poison, 4)
    assert json.loads((source / CONFIG_FILE).read_text())["r"] == 8


def _digest(path: Path, live: LiveServer) -> Digest:
    """Return the digest of a source, without registering it."""
    checked = live.client.register("checked", path, validate_only=True)
    return Digest(checked.adapter.digest)


def _raise(error: grpc.RpcError | None) -> None:
    assert error is not None
    raise error


# -- soft rows ---------------------------------------------------------------------------------------------------------


def test_soft_rows_that_the_base_cannot_compute_fail_their_adapter_and_nothing_else(
    server: LiveServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, used = server.client, server.kv_blocks_used()
    client.register("soft", sources("prompt-2"))

    def fault(blocks: list[int], virtual: object) -> None:
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patch:
        patch.setattr(server.runner, "write_virtual", fault)
        refused(lambda: client.generate("soft"), "INTERNAL", "STEP_FAILED", "virtual positions")
        wait_until(lambda: client.get("soft").state == FAILED)
        assert client.get("soft").state_reason == "STEP_FAILED"
        refused(lambda: client.generate("soft"), "FAILED_PRECONDITION", "ADAPTER_NOT_READY", "failed")
        refused(lambda: client.register("pinned", sources("prompt-3"), pin=True), "INTERNAL", "STEP_FAILED")
    assert server.kv_blocks_used() == used
    client.register("soft", sources("prompt-2"))
    assert client.get("soft").state == ACTIVE, "registered again, it gets another chance"
    assert len(client.tokens("soft", 4)) == 4
    client.unregister("soft")
    assert server.kv_blocks_used() == used
