"""Two server processes on one store: no acknowledged change is lost, and each soon shows what the other changed.

`make soak` (WEFT_SOAK) makes more mixed operations.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import grpc
import pytest

from tests.reliability.ledger import Ledger
from tests.reliability.pair import ACTIVE, SEEN_WITHIN_S, Pair, digest, listed, source
from tests.server.live import Client, refused
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.store import AdapterStore
from weft.config import AdapterLimits
from weft.v1 import adapter_pb2, generation_pb2

FAILED, QUARANTINED = adapter_pb2.ADAPTER_STATE_FAILED, adapter_pb2.ADAPTER_STATE_QUARANTINED

NUM_OPERATIONS = 10_000 if os.environ.get("WEFT_SOAK") else 80
OPERATIONS_PER_KILL = 60
LONG = generation_pb2.Stopping(min_new_tokens=200, max_new_tokens=200)


def seen(condition: Callable[[], bool]) -> None:
    """Wait until a change shows, which must be soon."""
    give_up_at = time.monotonic() + SEEN_WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_at, "the other server's change does not show"
        time.sleep(0.02)


def digest_on(client: Client, adapter_id: str) -> str | None:
    adapter = listed(client, adapter_id)
    return None if adapter is None else adapter.digest


def removed(pair: Pair, adapter_id: str) -> None:
    """Unregister an id, and wait until neither server shows it."""
    with contextlib.suppress(grpc.RpcError):
        pair.a.client.unregister(adapter_id)
    seen(lambda: digest_on(pair.a.client, adapter_id) is None)
    seen(lambda: digest_on(pair.b.client, adapter_id) is None)


def test_a_change_of_one_server_shows_on_the_other(pair: Pair) -> None:
    """Register, replace, pin, unpin, unregister; answers are those of the new content."""
    a, b = pair.a.client, pair.b.client
    a.register("moving", source("upper-lora"))
    seen(lambda: digest_on(b, "moving") == digest("upper-lora"))
    first = a.tokens("moving")
    assert b.tokens("moving") == first != b.tokens(None)
    a.register("moving", source("caesar-prefix"), replace=True)
    seen(lambda: digest_on(b, "moving") == digest("caesar-prefix"))
    assert b.tokens("moving") == a.tokens("moving") != first
    b.load("moving", pin=True)
    seen(lambda: a.get("moving").pinned and a.get("moving").residency == adapter_pb2.ADAPTER_RESIDENCY_DEVICE)
    a.unload("moving")
    seen(lambda: not b.get("moving").pinned)
    b.unregister("moving")
    seen(lambda: digest_on(a, "moving") is None)
    refused(lambda: a.generate("moving"), "NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_a_writer_with_a_stale_digest_is_refused(pair: Pair) -> None:
    """At once after the other server's change, when this server may not have seen it."""
    a, b = pair.a.client, pair.b.client
    first = a.register("x", source("reverse-lora")).adapter.digest
    seen(lambda: digest_on(b, "x") == first)
    second = a.register("x", source("upper-lora"), replace=True, expected_digest=first).adapter.digest
    refused(
        lambda: b.register("x", source("caesar-lora"), replace=True, expected_digest=first),
        "ABORTED",
        "VERSION_CONFLICT",
    )
    kept = pair.manifest("x")
    assert kept is not None
    assert kept.digest == second == digest("upper-lora")
    third = a.register("x", source("zigzag-lora"), replace=True).adapter.digest
    refused(lambda: b.unregister("x", expected_digest=second), "ABORTED", "VERSION_CONFLICT")
    kept = pair.manifest("x")
    assert kept is not None
    assert kept.digest == third
    seen(lambda: digest_on(b, "x") == third)
    assert b.tokens("x") == a.tokens("x")
    b.unregister("x", expected_digest=third)
    assert pair.manifest("x") is None
    removed(pair, "x")


def test_an_id_that_the_other_server_took_is_not_overwritten(pair: Pair) -> None:
    a, b = pair.a.client, pair.b.client
    taken = a.register("taken", source("upper-ia3")).adapter.digest
    refused(lambda: b.register("taken", source("caesar-ia3")), "ALREADY_EXISTS", "ADAPTER_EXISTS")
    assert b.register("taken", source("upper-ia3")).adapter.digest == taken, "the same content is no conflict"
    a.unregister("taken")
    refused(
        lambda: b.register("taken", source("caesar-ia3"), replace=True, expected_digest=taken),
        "ABORTED",
        "VERSION_CONFLICT",
    )
    b.register("taken", source("caesar-ia3"), expected_digest="")
    refused(lambda: a.register("taken", source("upper-ia3"), expected_digest=""), "ABORTED", "VERSION_CONFLICT")
    a.register("taken", source("upper-ia3"), replace=True)  # the last writer wins
    seen(lambda: digest_on(b, "taken") == taken)
    removed(pair, "taken")


def test_what_the_other_server_unregistered_is_not_found(pair: Pair) -> None:
    a, b = pair.a.client, pair.b.client
    a.register("gone", source("upper-ia3"))
    seen(lambda: digest_on(b, "gone") is not None)
    a.unregister("gone")
    refused(lambda: b.unregister("gone"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    removed(pair, "gone")


def test_running_requests_finish_on_their_content(pair: Pair) -> None:
    """Streams of one server end with the tokens they began with, whatever the other server does to their adapter."""
    a, b = pair.a.client, pair.b.client
    for change in (lambda: a.register("run", source("zigzag-lora"), replace=True), lambda: a.unregister("run")):
        a.register("run", source("upper-lora"), replace=True)
        seen(lambda: digest_on(b, "run") == digest("upper-lora"))
        alone = b.tokens("run", cache_salt="alone", stopping=LONG)
        stream = b.stream("run", stopping=LONG)
        stream.wait_tokens(3)
        change()
        seen(lambda: digest_on(b, "run") != digest("upper-lora") or b.get("run").state != ACTIVE)
        answer = stream.result()
        assert answer.tokens == alone
        assert answer.digest == digest("upper-lora")
    seen(lambda: digest_on(b, "run") is None)


def test_what_is_listed_as_active_can_answer(pair: Pair) -> None:
    """Also on a server that holds no copy, when another one replaced the content and removed its files."""
    a = pair.a.client
    a.register("z", source("zigzag-lora"))
    pair.restart_b("--adapter-host-bytes", "1", "--adapter-device-bytes", "1MiB")
    b = pair.b.client
    assert b.tokens("z")
    a.register("z", source("upper-ia3"), replace=True)
    time.sleep(0.5)
    with contextlib.suppress(grpc.RpcError):
        b.unload("z")
    assert b.get("z").state == ACTIVE
    assert b.generate("z").digest == digest("upper-ia3")
    pair.restart_b()
    removed(pair, "z")


def test_the_files_of_a_replaced_adapter_go_with_its_last_user(pair: Pair) -> None:
    a, b = pair.a.client, pair.b.client
    before = {path.name for path in (pair.store / "versions").iterdir()}
    for name in ("upper-lora", "caesar-ia3", "zigzag-lora"):
        a.register("files", source(name), replace=True)
        seen(lambda name=name: digest_on(b, "files") == digest(name))
        b.tokens("files", 2)
    removed(pair, "files")
    seen(lambda: {path.name for path in (pair.store / "versions").iterdir()} == before)


def test_a_quarantine_in_the_store_holds_on_both(pair: Pair) -> None:
    """Until it is lifted, also on a server that starts meanwhile."""
    clients = lambda: (pair.a.client, pair.b.client)  # noqa: E731  one of them is restarted
    content = AdapterDigest(pair.a.client.register("sick", source("upper-ia3")).adapter.digest)
    seen(lambda: digest_on(pair.b.client, "sick") == content)
    store = AdapterStore(pair.store, AdapterLimits())
    store.set_quarantined(AdapterId("sick"), content, "ADAPTER_NON_FINITE")
    for client in clients():
        seen(lambda client=client: client.get("sick").state == QUARANTINED)
        refused(lambda client=client: client.generate("sick"), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED")
    pair.restart_b()
    assert pair.b.client.get("sick").state_reason == "ADAPTER_NON_FINITE"
    store.set_quarantined(AdapterId("sick"), content, "")
    for client in clients():
        seen(lambda client=client: client.get("sick").state == ACTIVE)
        assert client.tokens("sick")
    removed(pair, "sick")


def test_files_that_one_server_repairs_serve_the_other(pair: Pair) -> None:
    a, b = pair.a.client, pair.b.client
    content = a.register("rotten", source("upper-ia3")).adapter.digest
    seen(lambda: digest_on(b, "rotten") == content)
    alone = b.tokens("rotten")
    blob = pair.store / "versions" / content / "adapter_model.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    for client in (a, b):
        client.unload("rotten")
        refused(lambda client=client: client.generate("rotten"), "DATA_LOSS", "BLOB_CORRUPT")
        assert client.get("rotten").state == FAILED
    b.register("rotten", source("upper-ia3"))
    seen(lambda: a.get("rotten").state == ACTIVE)
    assert a.tokens("rotten") == b.tokens("rotten") == alone
    removed(pair, "rotten")


@pytest.fixture(autouse=True)
def _both_live(pair: Pair) -> None:
    """Check that no test ends a server."""
    assert pair.a.is_alive
    assert pair.b.is_alive


# Mixed operations, with kills


class Mix:
    """Random operations on a few ids, through either server, each with the outcome that the ledger demands."""

    IDS = ("mix-0", "mix-1", "mix-2")
    CONTENTS = ("upper-ia3", "caesar-ia3", "zigzag-ia3", "reverse-ia3")

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.dice = random.Random(seed)
        self.ledger = Ledger(self.IDS)
        self.digests = {name: digest(name) for name in self.CONTENTS}
        self.counts: dict[str, int] = {}

    def draw(self) -> tuple[str, str, Callable[[Client], object], str, str]:
        """Return (adapter id, operation, call, expected outcome, digest after success)."""
        adapter_id, name = self.dice.choice(self.IDS), self.dice.choice(self.CONTENTS)
        current, wanted = self.ledger[adapter_id], self.digests[name]
        stale = self.dice.choice([other for other in self.digests.values() if other != current])
        operation = self.dice.choice(["register", "replace", "replace", "swap", "stale swap", "remove", "stale remove"])

        def register(client: Client, **fields: object) -> object:
            return client.register(adapter_id, source(name), **fields)

        def remove(client: Client, **fields: object) -> object:
            return client.unregister(adapter_id, **fields)

        match operation:
            case "register":
                outcome = "OK" if current in ("", wanted) else "ALREADY_EXISTS"
                return adapter_id, operation, register, outcome, wanted
            case "replace":
                return adapter_id, operation, lambda c: register(c, replace=True), "OK", wanted
            case "swap":
                return adapter_id, operation, lambda c: register(c, replace=True, expected_digest=current), "OK", wanted
            case "stale swap":
                outcome = "OK" if current == wanted else "ABORTED"
                return (
                    adapter_id,
                    operation,
                    lambda c: register(c, replace=True, expected_digest=stale),
                    outcome,
                    wanted,
                )
            case "remove":
                return adapter_id, operation, remove, "OK" if current else "NOT_FOUND", ""
            case _:
                outcome = "ABORTED" if current else "NOT_FOUND"
                return adapter_id, operation, lambda c: remove(c, expected_digest=stale), outcome, ""

    def step(self) -> None:
        """Do one operation through one server; its outcome must be that of a single server."""
        adapter_id, operation, call, expected, after = self.draw()
        outcome = outcome_of(call, self.dice.choice([self.pair.a, self.pair.b]).client)
        assert outcome == expected, (adapter_id, operation)
        self.counts[operation] = self.counts.get(operation, 0) + 1
        if outcome == "OK":
            self.ledger.acknowledged(adapter_id, after)

    def race(self) -> None:
        """Swap one id through both servers at once, each expecting the same digest: exactly one succeeds."""
        adapter_id = self.dice.choice(self.IDS)
        current = self.ledger[adapter_id]
        names = self.dice.sample([name for name, other in self.digests.items() if other != current], 2)
        outcomes = ["", ""]

        def swap(index: int, client: Client) -> None:
            fields = {"replace": True, "expected_digest": current}
            outcomes[index] = outcome_of(lambda c: c.register(adapter_id, source(names[index]), **fields), client)

        clients = (self.pair.a.client, self.pair.b.client)
        threads = [threading.Thread(target=swap, args=(index, client)) for index, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["ABORTED", "OK"], outcomes
        self.ledger.acknowledged(adapter_id, self.digests[names[outcomes.index("OK")]])

    def kill(self) -> None:
        """Kill server b at a random instant of an operation, and start it again."""
        adapter_id, _, call, _, after = self.draw()
        killer = threading.Timer(self.dice.uniform(0.0, 0.04), self.pair.b.signal, [signal.SIGKILL])
        killer.start()
        outcome = outcome_of(call, self.pair.b.client)
        killer.join()
        if outcome == "OK":
            self.ledger.acknowledged(adapter_id, after)
        elif outcome == "UNAVAILABLE":
            self.ledger.cut_off(adapter_id, after)
        self.pair.restart_b()

    def both_agree(self) -> None:
        """Check that both servers soon list what the ledger says."""
        for server in (self.pair.a, self.pair.b):
            for adapter_id in self.IDS:
                seen(lambda s=server, i=adapter_id: (digest_on(s.client, i) or "") == self.ledger[i])


def outcome_of(call: Callable[[Client], object], client: Client) -> str:
    """Return the status of a call."""
    try:
        call(client)
    except grpc.RpcError as error:
        return error.code().name  # pyright: ignore[reportAttributeAccessIssue]
    return "OK"


def test_mixed_operations_lose_nothing(pair: Pair) -> None:
    mix = Mix(pair, seed=6)
    for number in range(1, NUM_OPERATIONS + 1):
        mix.race() if number % 10 == 0 else mix.step()
        if number % OPERATIONS_PER_KILL == 0:
            mix.kill()
        if number % 20 == 0:
            assert mix.ledger.judge(pair.store / "catalog") == []
            mix.both_agree()
    for adapter_id in mix.IDS:
        removed(pair, adapter_id)
    assert len(mix.counts) == 6, "some operation was never drawn"


def test_the_ledger_sees_a_lost_change(pair: Pair) -> None:
    """Negative control: acknowledged changes that something else undid, and a change that was never acknowledged."""
    ledger, catalog = Ledger(["lost", "kept"]), pair.store / "catalog"
    for adapter_id in ("lost", "kept"):
        ledger.acknowledged(adapter_id, pair.a.client.register(adapter_id, source("upper-ia3")).adapter.digest)
    assert ledger.judge(catalog) == []
    (catalog / "lost.json").unlink()
    assert [lost.adapter_id for lost in ledger.judge(catalog)] == ["lost"]
    pair.b.client.register("kept", source("caesar-ia3"), replace=True)
    assert [lost.found for lost in ledger.judge(catalog)] == [digest("caesar-ia3")]
    removed(pair, "lost")
    removed(pair, "kept")
