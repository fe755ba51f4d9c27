"""Compositions with virtual tokens through the API: their order and weights matter, their pages are shared."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Sources
from tests.server.live import WAIT_S, LiveServer, refused, wait_until
from weft.adapters.identifiers import AdapterDigest
from weft.v1 import generation_pb2

LONG = 24
TEXT = "A prompt that is long enough to fill several blocks of keys and values with what its adapters made of it."


def of(*parts: tuple[str, float]) -> dict[str, Any]:
    """The field of a request."""
    weighted = [generation_pb2.WeightedAdapter(adapter_id=name, weight=weight) for name, weight in parts]
    return {"composition": generation_pb2.Composition(adapters=weighted)}


@pytest.fixture
def soft(registered: Callable[[str, Path], AdapterDigest], sources: Sources) -> AdapterDigest:
    """A soft prompt under the id "soft"."""
    return registered("soft", sources("prompt-2"))


def _cached(server: LiveServer, *parts: tuple[str, float], salt: str) -> int:
    return server.client.generate(None, 2, text=TEXT, cache_salt=salt, **of(*parts)).finish.usage.cached_prompt_tokens


def test_virtual_parts_answer_together(server: LiveServer, soft: AdapterDigest) -> None:
    """At weight 0 a part is absent, at 1 it is the adapter itself; any other weight or part gives another answer."""

    def tokens(*parts: tuple[str, float]) -> tuple[int, ...]:
        return tuple(server.client.tokens(None, LONG, text=TEXT, **of(*parts)))

    lora = ("lora-1", 0.5)
    different = [
        tokens(lora),
        tokens(lora, ("prefix-1", 1.0)),
        tokens(lora, ("prefix-1", 4.0)),
        tokens(lora, ("soft", 1.0)),
        tokens(lora, ("prefix-1", 1.0), ("soft", 1.0)),
        tokens(lora, ("prefix-1", 0.05), ("soft", 4.0)),
    ]
    assert len(set(different)) == len(different)
    assert tokens(lora, ("prefix-1", 1.0), ("soft", 0.0)) == different[1]
    assert tokens(("soft", 1.0), ("prefix-1", 0.0), lora) == different[3]
    assert tokens(("prefix-1", 1.0), ("soft", 1.0), lora) == different[4], "deltas may stand anywhere"
    assert tokens(("soft", 1.0)) == tuple(server.client.tokens("soft", LONG, text=TEXT))


def test_the_same_composition_shares_its_prefix(server: LiveServer, soft: AdapterDigest) -> None:
    """Virtual parts in their order, deltas in any."""
    full = len(TEXT) // 16 * 16
    lora, ia3, prefix, prompt = ("lora-1", 0.5), ("ia3-1", 1.0), ("prefix-1", 0.25), ("soft", 2.0)
    assert full >= 64
    assert _cached(server, lora, prefix, ia3, prompt, salt="virtual") == 0
    assert _cached(server, ia3, prefix, prompt, lora, salt="virtual") == full
    for other in (
        (lora, ia3, prompt, prefix),  # another order of the positions
        (lora, ia3, ("prefix-1", 0.5), prompt),
        (lora, ia3, ("prefix-1", 2.0), ("soft", 0.25)),
        (lora, ia3, prefix),
        (prefix, prompt),
    ):
        assert _cached(server, *other, salt="virtual") == 0, other


def test_pages_of_virtual_tokens_are_shared(server: LiveServer, soft: AdapterDigest) -> None:
    """Two compositions and two plain requests at once hold one set of pages of each adapter, at any weight."""
    held = server.application.engine.residency
    prefix = AdapterDigest(server.client.get("prefix-1").digest)
    for adapter_id in ("prefix-1", "soft"):
        server.client.load(adapter_id)
    with server.gate.held():
        streams = [
            server.client.stream(None, 4, **of(("prefix-1", 0.5), ("soft", 2.0))),
            server.client.stream(None, 4, **of(("soft", 1.0), ("lora-1", 1.0), ("prefix-1", 1.0))),
            server.client.stream("prefix-1", 4),
            server.client.stream("soft", 4),
        ]
        wait_until(lambda: server.application.requests.admission.num_requests == 4)
        server.gate.let(1)
        wait_until(lambda: len(_running(server)) == 4)
        pages = {digest: held._resident[digest].blocks for digest in (prefix, soft)}
        tables = [request.virtual_blocks for request in _running(server)]
        server.gate.open()
        for stream in streams:
            assert len(stream.result().tokens) == 4
    expected = [pages[prefix] + pages[soft], pages[soft] + pages[prefix], pages[prefix], pages[soft]]
    assert sorted(tables) == sorted(expected)
    assert pages[prefix] != pages[soft]
    assert len(pages[prefix]) == len(pages[soft]) == 1


def _running(server: LiveServer) -> list[Any]:
    return list(server.application.engine.scheduler.running)


def test_context_counts_the_virtual_tokens_of_all_parts(server: LiveServer, soft: AdapterDigest) -> None:
    refused(
        lambda: server.client.generate(None, 7, text="x" * 245, **of(("prefix-1", 0.5), ("soft", 4.0))),
        "INVALID_ARGUMENT",
        "CONTEXT_EXCEEDED",
        "10 virtual tokens",
    )
    assert len(server.client.tokens(None, 1, text="x" * 245, **of(("prefix-1", 0.5), ("soft", 4.0)))) == 1


def test_a_prefix_that_goes_ends_what_it_is_part_of(
    server: LiveServer, registered: Callable[[str, Path], AdapterDigest], sources: Sources, soft: AdapterDigest
) -> None:
    registered("leaving", sources("prefix-3"))
    with server.gate.held(), ThreadPoolExecutor() as threads:
        running = server.client.stream(None, LONG, **of(("soft", 0.5), ("leaving", 0.5)))
        wait_until(lambda: server.client.get("leaving").in_flight_requests == 1)
        removing = threads.submit(server.client.unregister, "leaving", mode="UNREGISTER_MODE_CANCEL")
        server.gate.open()
        assert removing.result(WAIT_S).cancelled_requests == 1
    refused(lambda: running, "ABORTED", "ADAPTER_UNREGISTERED", "leaving")
    assert server.client.get("soft").in_flight_requests == 0
