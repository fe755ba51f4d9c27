"""Two server processes on one store: no acknowledged change is lost, and each soon shows what the other changed."""

import contextlib
import time
from collections.abc import Callable

import grpc
import pytest

from tests.reliability.pair import ACTIVE, SEEN_WITHIN_S, Pair, digest, listed, source
from tests.server.live import Client, refused
from weft.v1 import adapter_pb2, generation_pb2

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


@pytest.fixture(autouse=True)
def _both_live(pair: Pair) -> None:
    """Check that no test ends a server."""
    assert pair.a.is_alive
    assert pair.b.is_alive
