"""Compositions through the API: answers, sharing, failure as a whole, counting."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.server.conftest import Sources
from tests.server.live import WAIT_S, LiveServer, refused, wait_until
from tests.server.test_metrics import change_of, value
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.slots import AdapterSlot
from weft.api import composition
from weft.cli import app
from weft.errors import InvalidRequest
from weft.v1 import adapter_pb2, generation_pb2

LONG = 24
TEXT = "A prompt that is long enough to fill several blocks of keys and values with what its adapters made of it."
DRAINING, QUARANTINED = adapter_pb2.ADAPTER_STATE_DRAINING, adapter_pb2.ADAPTER_STATE_QUARANTINED


def of(**weights: float | None) -> dict[str, Any]:
    """Return the field of a request; `_` stands for `-` in ids, None for a weight that is not given."""
    parts = [
        generation_pb2.WeightedAdapter(adapter_id=name.replace("_", "-"), weight=weight)
        for name, weight in weights.items()
    ]
    return {"composition": generation_pb2.Composition(adapters=parts)}


def _scaled(sources: Sources, name: str, factor: float) -> Path:
    """Return a LoRA whose product is `factor` times that of another."""
    parts = sources.parts(name)
    tensors = {key: tensor * factor if "lora_B" in key else tensor for key, tensor in parts.tensors.items()}
    return parts.with_tensors(tensors).write(sources.root / f"{name}-times-{factor}")


def _merged(server: LiveServer, *parts: str) -> Path:
    """Return the result of `weft adapters merge` for DIR=WEIGHT parts: one LoRA of the sum of their ranks."""
    output = server.config.allowed_sources[0] / "merged"
    result = CliRunner().invoke(
        app, ["adapters", "merge", *parts, str(output), "--base", str(server.config.model.path)]
    )
    assert result.exit_code == 0, result.stderr
    return output


def test_a_composition_is_the_weighted_sum(
    server: LiveServer, sources: Sources, registered: Callable[[str, Path], str]
) -> None:
    """Powers of two, so that scaling is exact in any precision and answers can be compared token for token."""
    client = server.client
    registered("b", sources("lora-5"))
    registered("a-half", _scaled(sources, "lora-1", 0.5))
    registered("b-double", _scaled(sources, "lora-5", -2.0))
    registered("both", _merged(server, f"{sources('lora-1')}=0.5", f"{sources('lora-5')}=-2"))
    answer = client.generate(None, LONG, text=TEXT, **of(lora_1=0.5, b=-2.0))
    for same in (
        client.tokens("both", LONG, text=TEXT),
        client.tokens(None, LONG, text=TEXT, **of(a_half=1.0, b_double=None)),
        client.tokens(None, LONG, text=TEXT, **of(a_half=1.0, b=-2.0)),
    ):
        assert answer.tokens == same
    # Negative control: another weight, another order of weights or one adapter alone is another answer.
    others = [of(lora_1=0.5, b=-1.0), of(lora_1=-2.0, b=0.5), of(lora_1=0.5), of(b=-2.0)]
    assert answer.tokens not in [client.tokens(None, LONG, text=TEXT, **other) for other in others]
    effective = [(part.adapter_id, part.weight, part.method) for part in answer.finish.effective_adapters]
    assert effective == [("lora-1", 0.5, "lora"), ("b", -2.0, "lora")]


def test_one_part_of_weight_1_is_the_adapter(server: LiveServer) -> None:
    for name in ("lora-1", "ia3-1", "prefix-1"):
        weights = {name.replace("-", "_"): 1.0}
        assert server.client.tokens(name, LONG) == server.client.tokens(None, LONG, **of(**weights))


def test_an_answer_names_every_part(server: LiveServer) -> None:
    """Also those of weight 0, which took no part; weights are returned as they were written."""
    options = generation_pb2.ResponseOptions(token_ids=True, gates=True)
    digests = {name: server.client.get(name).digest for name in ("lora-1", "ia3-1", "prefix-1")}
    answer = server.client.generate(None, options=options, **of(prefix_1=0.0, lora_1=0.3, ia3_1=1e-60))
    told = [(part.adapter_id, part.digest, part.weight) for part in answer.finish.effective_adapters]
    weights = {"prefix-1": 0.0, "lora-1": 0.3, "ia3-1": 1e-60}
    assert told == [(name, digests[name], weight) for name, weight in weights.items()]
    assert [gate.adapter_id for gate in answer.finish.gates] == list(weights)
    assert [gate.mean for gate in answer.finish.gates] == pytest.approx(list(weights.values()))
    assert answer.tokens == server.client.tokens(None, **of(lora_1=0.3))


def test_a_part_can_name_its_digest(server: LiveServer) -> None:
    lora, ia3 = (server.client.get(name).digest for name in ("lora-1", "ia3-1"))
    parts = [
        generation_pb2.WeightedAdapter(adapter_id=f"lora-1@{lora}"),
        generation_pb2.WeightedAdapter(adapter_id=f"ia3-1@{ia3}"),
    ]
    answer = server.client.generate(composition=generation_pb2.Composition(adapters=parts))
    assert answer.tokens == server.client.tokens(None, **of(lora_1=1.0, ia3_1=1.0))
    assert [(part.adapter_id, part.digest) for part in answer.finish.effective_adapters] == [
        ("lora-1", lora),
        ("ia3-1", ia3),
    ]


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_the_same_composition_in_any_order_shares_its_prefix(server: LiveServer) -> None:
    client, blocks = server.client, len(TEXT) // 16

    def ask(salt: str = "order", **weights: float | None) -> generation_pb2.Finish:
        return client.generate(None, 4, text=TEXT, cache_salt=salt, **of(**weights)).finish

    def cached(finish: generation_pb2.Finish) -> int:
        return finish.usage.cached_prompt_tokens

    assert blocks >= 4
    assert cached(ask(lora_1=0.7, ia3_1=-0.5)) == 0
    assert cached(ask(ia3_1=-0.5, lora_1=0.7)) == blocks * 16
    assert cached(ask(ia3_1=-0.5, lora_1=0.7, prefix_1=0.0)) == blocks * 16, "weight 0 is no part of the key"
    # Negative controls: weights, parts and salt are part of the key.
    for other in (of(lora_1=0.7, ia3_1=0.5), of(lora_1=-0.5, ia3_1=0.7), of(lora_1=0.7), of(ia3_1=-0.5)):
        finish = client.generate(None, 4, text=TEXT, cache_salt="order", **other).finish
        assert cached(finish) == 0, other
    assert cached(client.generate("lora-1", 4, text=TEXT, cache_salt="order").finish) == 0
    assert cached(client.generate(None, 4, text=TEXT, cache_salt="order").finish) == 0
    assert cached(ask("another", lora_1=0.7, ia3_1=-0.5)) == 0
    # One part of weight 1 is the adapter itself, and shares its blocks.
    assert cached(ask(lora_1=1.0)) == blocks * 16


def test_cached_blocks_of_a_composition_go_with_any_of_its_adapters(
    server: LiveServer, sources: Sources, registered: Callable[[str, Path], str]
) -> None:
    held = server.application.engine.blocks
    digest = registered("leaving", sources("lora-6"))
    for _ in range(2):
        finish = server.client.generate(None, 4, text=TEXT, **of(lora_1=0.5, leaving=0.5)).finish
    assert finish.usage.cached_prompt_tokens > 0
    assert any(AdapterDigest(digest) in digests for digests in held._digests_of.values())
    assert server.client.unregister("leaving").freed_kv_blocks >= len(TEXT) // 16
    assert not any(AdapterDigest(digest) in digests for digests in held._digests_of.values())


# -- what fails, fails as a whole -------------------------------------------------------------------------------------


def _in_flight(live: LiveServer) -> dict[str, int]:
    return {adapter.adapter_id: adapter.in_flight_requests for adapter in live.client.list().adapters}


def test_row_84_the_same_content_under_two_ids(
    server: LiveServer, sources: Sources, registered: Callable[[str, Path], str]
) -> None:
    registered("twin", sources("lora-1"))
    failure = refused(
        lambda: server.client.generate(None, **of(ia3_1=1.0, lora_1=0.5, twin=0.5)),
        "INVALID_ARGUMENT",
        "COMPOSITION_INVALID",
        "composition.adapters[2].adapter_id: has the content of part 1, lora-1",
        "given twin",
        retry=False,
    )
    assert failure.metadata["index"] == "2"
    assert set(_in_flight(server).values()) == {0}


def test_row_84_tells_the_index(server: LiveServer) -> None:
    failure = refused(
        lambda: server.client.generate(None, **of(ia3_1=1.0, lora_1=9.0)), "INVALID_ARGUMENT", "COMPOSITION_INVALID"
    )
    assert (failure.metadata["index"], failure.metadata["field"]) == ("1", "composition.adapters[1].weight")


def test_row_85_a_part_that_is_going(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.register("leaving", sources("ia3-2"))
    with tight.gate.held(), ThreadPoolExecutor() as threads:
        running = client.stream(None, 8, **of(lora_1=0.5, leaving=0.5))
        wait_until(lambda: client.get("leaving").in_flight_requests == 1)
        removing = threads.submit(client.unregister, "leaving")
        wait_until(lambda: client.get("leaving").state == DRAINING)
        refused(
            lambda: client.generate(None, **of(lora_1=0.5, leaving=0.5)),
            "FAILED_PRECONDITION",
            "ADAPTER_DRAINING",
            "composition.adapters[1].adapter_id: leaving",
            retry=False,
        )
        assert _in_flight(tight) == {"lora-1": 1, "leaving": 1}, "what was refused holds nothing"
        tight.gate.open()
        assert removing.result(WAIT_S).cancelled_requests == 0
        assert len(running.result().tokens) == 8
    refused(
        lambda: client.generate(None, **of(lora_1=0.5, leaving=0.5)),
        "NOT_FOUND",
        "ADAPTER_NOT_FOUND",
        "composition.adapters[1].adapter_id: leaving",
    )


def test_a_cancelled_part_ends_the_whole_request(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.register("leaving", sources("ia3-2"))
    with tight.gate.held():
        running = client.stream(None, LONG, **of(lora_1=0.5, leaving=0.0))  # leased, although it takes no part
        tight.gate.let(3)
        with ThreadPoolExecutor() as threads:
            removing = threads.submit(client.unregister, "leaving", mode="UNREGISTER_MODE_CANCEL")
            wait_until(lambda: client.get("leaving").state == DRAINING)
            tight.gate.open()
            assert removing.result(WAIT_S).cancelled_requests == 1
    refused(lambda: running, "ABORTED", "ADAPTER_UNREGISTERED", "leaving", retry=False)
    wait_until(lambda: _in_flight(tight) == {"lora-1": 0})


def test_what_fails_after_the_look_up_leaves_no_lease(server: LiveServer) -> None:
    refused(
        lambda: server.client.generate(None, 7, text="x" * 250, **of(lora_1=0.5, prefix_1=1.0)),
        "INVALID_ARGUMENT",
        "CONTEXT_EXCEEDED",
        "5 virtual tokens",
        "room for 1 ",
    )
    # A prefix of weight 0 takes no room.
    refused(
        lambda: server.client.generate(None, 7, text="x" * 250, **of(lora_1=0.5, prefix_1=0.0)),
        "INVALID_ARGUMENT",
        "CONTEXT_EXCEEDED",
        "0 virtual tokens",
        "room for 6 ",
    )
    assert set(_in_flight(server).values()) == {0}


# -- numbers that are not finite --------------------------------------------------------------------------------------


def test_row_85_a_fault_is_charged_to_the_part_that_fails_alone(
    tight: LiveServer, sources: Sources, poison: str
) -> None:
    client = tight.client
    client.register("beside", sources("ia3-3"))
    client.register("absent", sources("ia3-4"))
    alone = client.tokens("lora-1", LONG, cache_salt="alone", text=TEXT)
    with tight.gate.held():
        neighbour = client.stream("lora-1", LONG, text=TEXT)
        victim = client.stream(None, LONG, text=TEXT, **of(poison=1.0, beside=0.5, absent=0.0))
        wait_until(lambda: tight.application.requests.admission.num_requests == 2)
    refused(lambda: victim, "FAILED_PRECONDITION", "ADAPTER_NON_FINITE", "the adapters", retry=False)
    assert neighbour.result().tokens == alone
    wait_until(lambda: client.get("poison").state == QUARANTINED)
    states = {name: client.get(name).state for name in ("poison", "beside", "absent", "lora-1")}
    assert [name for name, state in states.items() if state == QUARANTINED] == ["poison"]
    refused(
        lambda: client.generate(None, **of(absent=0.5, poison=1.0)),
        "FAILED_PRECONDITION",
        "ADAPTER_QUARANTINED",
        "composition.adapters[1].adapter_id: poison",
        retry=False,
    )
    assert len(client.tokens(None, 4, **of(absent=0.5, beside=0.5))) == 4
    for name in ("beside", "absent"):
        client.unregister(name)


def test_a_part_of_weight_0_that_holds_nan_has_no_effect(
    server: LiveServer, sources: Sources, registered: Callable[[str, Path], str]
) -> None:
    """The ingest would refuse it, so NaN is written over its bytes on the device."""
    client = server.client
    wanted = client.tokens(None, LONG, text=TEXT, cache_salt="nan", **of(lora_1=0.5, ia3_1=1.0))
    digest = AdapterDigest(registered("nan", sources("lora-8")))
    client.load("nan")
    residency = server.application.engine.residency
    slot: AdapterSlot = residency._resident[digest].slot
    for entry in server.runner.slots._held[slot].packed.entries:
        packed = entry.packed(server.runner.slots._held[slot].buffer)
        packed.first.fill_(float("nan"))
    with server.gate.held():  # beside a request that gets NaN from it
        victim = client.stream("nan", LONG, text=TEXT)
        mine = client.stream(None, LONG, text=TEXT, cache_salt="cold", **of(nan=0.0, ia3_1=1.0, lora_1=0.5))
        wait_until(lambda: server.application.requests.admission.num_requests == 2)
    refused(lambda: victim, "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    assert mine.result().tokens == wanted
    wait_until(lambda: client.get("nan").state == QUARANTINED)
    refused(lambda: client.generate(None, **of(nan=0.01, lora_1=0.5)), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED")
    assert QUARANTINED not in {client.get(name).state for name in ("ia3-1", "lora-1")}


# -- what is counted --------------------------------------------------------------------------------------------------


def test_composed_requests_are_counted_as_any(server: LiveServer) -> None:
    with change_of(server) as change, server.gate.held():
        streams = [
            server.client.stream(None, 6, **of(lora_1=0.5, ia3_1=0.25)),
            server.client.stream("lora-1", 6),
            server.client.stream(None, 6, **of(ia3_1=2.0, lora_1=0.0)),
        ]
        wait_until(lambda: server.application.requests.admission.num_requests == 3)
        server.gate.open()
        for stream in streams:
            stream.result()
    assert change.by("weft_requests_total", "finish_reason") == {"length": 3}
    assert change("weft_generation_tokens_total") == 18
    assert max(step.num_requests for step in change.steps) == 3
    assert change("weft_batch_distinct_adapters_bucket", le="2.0") == len(change.steps)
    assert change("weft_batch_distinct_adapters_sum") == sum(step.num_adapters for step in change.steps)
    assert max(step.num_adapters for step in change.steps) == 2, "distinct adapters, not parts"
    ids = {"lora-1", "ia3-1"}
    labels = {label for metric in change.after.values() for s in metric.samples for label in s.labels.values()}
    assert not ids & labels
    before = value(change.before, "weft_request_rejections_total", reason="COMPOSITION_INVALID")
    refused(lambda: server.client.generate(None, **of(lora_1=9.0)), "INVALID_ARGUMENT", "COMPOSITION_INVALID")
    assert value(server.scrape(), "weft_request_rejections_total", reason="COMPOSITION_INVALID") == before + 1


def test_weights_are_what_the_limits_say(server: LiveServer) -> None:
    """The bounds themselves are allowed, and the model info states them."""
    limits = server.config.requests
    assert (limits.composition_parts_max, limits.composition_weight_abs_max) == (8, 4.0)
    assert server.client.tokens(None, 2, **of(lora_1=-4.0, ia3_1=4.0))
    narrow = replace(limits, composition_parts_max=1, composition_weight_abs_max=0.5)
    pair = [composition.WeightedReference("a", 0.5), composition.WeightedReference("b", -0.5)]
    assert [part.gate for part in composition.check(pair, limits, base_model="")] == [0.5, -0.5]
    with pytest.raises(InvalidRequest, match=r"limit 1\), given 2"):
        composition.check(pair, narrow, base_model="")
    with pytest.raises(InvalidRequest, match=r"adapters\[0\]\.weight: must be from -0\.5 to 0\.5, given 0\.6"):
        composition.check([composition.WeightedReference("a", 0.6)], narrow, base_model="")
