"""Mixtures through the API: leases, answers, failure as a whole, and reports."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch

from tests.server.conftest import Sources
from tests.server.live import LiveServer, Loop, refused, wait_until
from weft.client import Client
from weft.client.failure import failure_of
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.checkpoint import safetensors_file
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.v1 import adapter_pb2, generation_pb2

TEXT = "A prompt that is long enough to fill several blocks of keys and values with what its experts made of it."
LONG = 12
GATES = generation_pb2.ResponseOptions(token_ids=True, gates=True)

Register = Callable[[str, Path], str]


def write_mixture(
    path: Path, sources: Sources, experts: dict[str, str], *, seed: int = 1, scale: float = 0.5, **config: Any
) -> Path:
    """Write a random router over experts: ids by digest."""
    made = MixtureConfig(num_experts=len(experts), **{"top_k": 2, **config})
    shape = (1 if made.shared else sources.base.num_layers, made.num_choices, sources.base.embedding_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    named = tuple(Expert(digest, adapter_id) for digest, adapter_id in experts.items())
    mixture_files.write(Mixture(made, MixtureParams(weight), named), path, sources.base)
    return path


@pytest.fixture
def experts(registered: Register, sources: Sources) -> dict[str, str]:
    """Return ids by digest, sorted by digest: two LoRAs and an IA³ that no other test uses."""
    names = {"first": "lora-21", "second": "lora-22", "third": "ia3-23"}
    return dict(sorted((registered(name, sources(source)), name) for name, source in names.items()))


@pytest.fixture
def mixed(registered: Register, sources: Sources, experts: dict[str, str], tmp_path: Path) -> str:
    """Register a mixture of them; return its id."""
    registered("mixed", write_mixture(sources.root / tmp_path.name, sources, experts))
    return "mixed"


def test_a_mixture_is_registered_answers_and_is_described(
    server: LiveServer, mixed: str, experts: dict[str, str]
) -> None:
    told = server.client.get(mixed)
    assert (told.method, told.state) == ("mixture", adapter_pb2.ADAPTER_STATE_ACTIVE)
    assert [(e.digest, e.adapter_id, e.available) for e in told.experts] == [(*e, True) for e in experts.items()]
    answer = server.client.generate(mixed, LONG, text=TEXT, options=GATES)
    (effective,) = answer.finish.effective_adapters
    assert (effective.adapter_id, effective.digest, effective.method) == (mixed, told.digest, "mixture")
    assert [(gate.digest, gate.adapter_id) for gate in answer.finish.gates] == list(experts.items())
    means = torch.tensor([gate.layer_means for gate in answer.finish.gates])
    assert means.shape == (3, server.model.base.shape.num_layers)
    torch.testing.assert_close(means.sum(0), torch.ones(server.model.base.shape.num_layers))
    assert answer.tokens == server.client.tokens(mixed, LONG, text=TEXT)
    others = [server.client.tokens(other, LONG, text=TEXT) for other in (None, *experts.values())]
    assert answer.tokens not in others, "negative control"


def test_one_expert_alone_is_that_adapter(server: LiveServer, mixed: str, experts: dict[str, str]) -> None:
    """With steering to one expert, by id or digest, all gates are exactly 1, and the answer is the adapter's."""
    for digest, name in experts.items():
        wanted = server.client.tokens(name, LONG, text=TEXT)
        for spelled in (name, digest, f"{name}@{digest}"):
            steering = generation_pb2.Steering(restrict=[spelled])
            assert server.client.tokens(mixed, LONG, text=TEXT, steering=steering) == wanted
        others = [other for other in experts.values() if other != name]
        assert server.client.tokens(mixed, LONG, text=TEXT, steering=generation_pb2.Steering(mask=others)) == wanted


def test_a_request_holds_the_mixture_and_its_experts_and_lets_all_go(
    server: LiveServer, mixed: str, experts: dict[str, str]
) -> None:
    names = [mixed, *experts.values()]
    with server.gate.held():
        running = server.client.stream(mixed, LONG, text=TEXT)
        wait_until(lambda: all(server.client.get(name).in_flight_requests == 1 for name in names))
        for name in names:
            refused(lambda name=name: server.client.unload(name), "FAILED_PRECONDITION", "ADAPTER_IN_USE")
    running.result()
    wait_until(lambda: not any(server.client.get(name).in_flight_requests for name in names))
    assert {server.client.get(name).residency for name in names} == {adapter_pb2.ADAPTER_RESIDENCY_DEVICE}


def test_an_expert_that_is_gone_fails_the_mixture_s_requests_by_name(
    server: LiveServer, mixed: str, experts: dict[str, str], sources: Sources, registered: Register
) -> None:
    """The mixture stays registered; the same content under another id makes it available again."""
    wanted = server.client.tokens(mixed, LONG, text=TEXT)
    digest = next(digest for digest, name in experts.items() if name == "second")
    server.client.unregister("second")
    said = refused(lambda: server.client.generate(mixed), "FAILED_PRECONDITION", "EXPERT_UNAVAILABLE", "second@")
    assert digest in said.message
    told = server.client.get(mixed)
    assert told.state == adapter_pb2.ADAPTER_STATE_ACTIVE
    assert [expert.available for expert in told.experts] == [name != "second" for name in experts.values()]
    assert registered("another-name", sources("lora-22")) == digest
    assert server.client.tokens(mixed, LONG, text=TEXT) == wanted
    assert "another-name" in [expert.adapter_id for expert in server.client.get(mixed).experts]
    # An expert replaced by other content is gone as well, and the new content never takes its place.
    server.client.register("another-name", sources("lora-24"), replace=True)
    refused(lambda: server.client.generate(mixed), "FAILED_PRECONDITION", "EXPERT_UNAVAILABLE", "not registered")


def test_requests_that_run_keep_a_removed_expert_or_end_with_its_name(
    server: LiveServer, mixed: str, experts: dict[str, str]
) -> None:
    wanted = server.client.tokens(mixed, LONG, text=TEXT)
    with ThreadPoolExecutor() as pool:
        with server.gate.held():
            kept = server.client.stream(mixed, LONG, text=TEXT)
            wait_until(lambda: server.client.get("first").in_flight_requests == 1)
            removal = pool.submit(server.client.unregister, "first")
            wait_until(lambda: server.client.get("first").state == adapter_pb2.ADAPTER_STATE_DRAINING)
            refused(lambda: server.client.generate(mixed), "FAILED_PRECONDITION", "EXPERT_UNAVAILABLE", "draining")
        assert kept.result().tokens == wanted
        assert removal.result().cancelled_requests == 0


def test_a_request_ends_with_the_name_of_a_cancelled_expert(
    server: LiveServer, mixed: str, experts: dict[str, str]
) -> None:
    with ThreadPoolExecutor() as pool:
        with server.gate.held():
            running = server.client.stream(mixed, LONG, text=TEXT)
            wait_until(lambda: server.client.get("third").in_flight_requests == 1)
            removal = pool.submit(server.client.unregister, "third", mode="UNREGISTER_MODE_CANCEL")
            wait_until(lambda: server.client.get("third").state == adapter_pb2.ADAPTER_STATE_DRAINING)
        refused(lambda: running, "ABORTED", "ADAPTER_UNREGISTERED", "third")
        assert removal.result().cancelled_requests == 1
    wait_until(lambda: not any(server.client.get(name).in_flight_requests for name in (mixed, "first", "second")))


def test_a_mixture_is_replaced_and_removed_like_any_adapter(
    server: LiveServer, mixed: str, experts: dict[str, str], sources: Sources, tmp_path: Path
) -> None:
    client = server.client
    before = client.tokens(mixed, LONG, text=TEXT)
    other = write_mixture(sources.root / f"{tmp_path.name}-other", sources, experts, seed=7, scale=4.0)
    refused(lambda: client.register(mixed, other), "ALREADY_EXISTS", "ADAPTER_EXISTS")
    digest = client.get(mixed).digest
    stale = "0" * 64
    refused(lambda: client.register(mixed, other, replace=True, expected_digest=stale), "ABORTED", "VERSION_CONFLICT")
    with server.gate.held():
        running = client.stream(mixed, LONG, text=TEXT)
        wait_until(lambda: client.get(mixed).in_flight_requests == 1)
        client.register(mixed, other, replace=True, expected_digest=digest)
        assert [old.digest for old in client.get(mixed).draining_versions] == [digest]
    assert running.result().tokens == before, "a request keeps the router that it was admitted with"
    assert client.tokens(mixed, LONG, text=TEXT) != before
    client.unregister(mixed)
    refused(lambda: client.generate(mixed), "NOT_FOUND", "ADAPTER_NOT_FOUND")
    wait_until(lambda: not any(client.get(name).in_flight_requests for name in experts.values()))


def test_a_mixture_is_uploaded(
    server: LiveServer, experts: dict[str, str], sources: Sources, registered: Register, tmp_path: Path
) -> None:
    path = write_mixture(sources.root / tmp_path.name, sources, experts)
    with Client(f"127.0.0.1:{server.serving.port}") as client:
        uploaded = client.upload("uploaded", path)
        try:
            assert uploaded.adapter.method == "mixture"
            assert registered("same", path) == uploaded.adapter.digest
            assert server.client.tokens("same", LONG) == server.client.tokens("uploaded", LONG)
            answer = client.generate(TEXT, "uploaded", token_gates=True, max_new_tokens=3, temperature=0.0)
            tokens = answer.finish.usage.prompt_tokens - answer.finish.usage.cached_prompt_tokens + 2
            (one, *_) = answer.finish.gates
            assert len(one.token_gates) == tokens * server.model.base.shape.num_layers
            by_layer = torch.tensor(one.token_gates).view(tokens, -1).mean(0)
            torch.testing.assert_close(by_layer, torch.tensor(one.layer_means))
        finally:
            client.unregister("uploaded")


def test_registering_needs_every_expert(
    server: LiveServer, experts: dict[str, str], sources: Sources, mixed: str, tmp_path: Path
) -> None:
    def refuse(listed: dict[str, str], reason: str, *says: str) -> None:
        path = write_mixture(sources.root / f"{tmp_path.name}-{len(listed)}", sources, listed)
        for fields in ({}, {"validate_only": True}):
            said = lambda: server.client.register("wrong", path, **fields)  # noqa: B023, E731
            refused(said, "FAILED_PRECONDITION", reason, *says)
        shutil.rmtree(path)

    refuse({**experts, "f" * 64: "nobody"}, "EXPERT_UNAVAILABLE", "nobody@ffff", "not registered")
    refuse({**experts, server.client.get(mixed).digest: ""}, "FEATURE_UNSUPPORTED", "is a mixture itself")
    refused(lambda: server.client.get("wrong"), "NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_experts_bring_virtual_tokens(
    server: LiveServer, experts: dict[str, str], sources: Sources, registered: Register, tmp_path: Path
) -> None:
    """Steered to the prefix alone, the mixture is the prefix; steered away from it, the prefix takes no part."""
    prefix = server.client.get("prefix-1").digest
    path = write_mixture(sources.root / tmp_path.name, sources, {**experts, prefix: "prefix-1"}, scale=0.05, top_k=4)
    registered("with-prefix", path)
    tokens = lambda **steering: server.client.tokens(  # noqa: E731
        "with-prefix", LONG, text=TEXT, steering=generation_pb2.Steering(**steering)
    )
    assert tokens(restrict=["prefix-1"]) == server.client.tokens("prefix-1", LONG, text=TEXT)
    finish = server.client.generate("with-prefix", LONG, text=TEXT, options=GATES).finish
    (gate,) = [gate for gate in finish.gates if gate.adapter_id == "prefix-1"]
    assert 0.05 < gate.mean < 0.6
    answers = [tokens(), tokens(mask=["prefix-1"]), tokens(restrict=["prefix-1"])]
    assert len({tuple(answer) for answer in answers}) == 3, "negative control"


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "no format": (lambda c: c.pop("mixture_format"), "MIXTURE_INVALID", "mixture_format: must be 1"),
    "another format": (lambda c: c.update(mixture_format=2), "MIXTURE_INVALID", "given 2"),
    "an unknown key": (lambda c: c.update(peft_type="LORA"), "CONFIG_FIELD_FORBIDDEN", "peft_type"),
    "an unknown router key": (lambda c: c["router"].update(code="x"), "CONFIG_FIELD_FORBIDDEN", "router.code"),
    "an unknown expert key": (lambda c: c["experts"][0].update(path="/"), "CONFIG_FIELD_FORBIDDEN", "experts[0].path"),
    "no router": (lambda c: c.pop("router"), "MIXTURE_INVALID", "router: must be an object"),
    "no experts": (lambda c: c.update(experts=[]), "MIXTURE_INVALID", "at least 1"),
    "experts by name": (lambda c: c.update(experts=["a", "b", "c"]), "MIXTURE_INVALID", "experts[0]"),
    "an abbreviated digest": (lambda c: c["experts"][1].update(digest="ab"), "MIXTURE_INVALID", "experts[1]"),
    "an expert twice": (
        lambda c: c["experts"][2].update(digest=c["experts"][0]["digest"]),
        "MIXTURE_INVALID",
        "is expert 0 already",
    ),
    "a bad id": (lambda c: c["experts"][0].update(adapter_id="../x"), "ID_INVALID", "experts[0].adapter_id"),
    "one expert more than rows": (
        lambda c: c["experts"].append({"digest": "a" * 64}),
        "DIM_MISMATCH",
        "router.weight",
    ),
    "a null expert without its row": (lambda c: c.update(null_expert=True), "DIM_MISMATCH", "router.weight"),
    "shared, with a router per layer": (lambda c: c["router"].update(shared=True), "DIM_MISMATCH", "router.weight"),
    "top_k 0": (lambda c: c.update(top_k=0), "MIXTURE_INVALID", "top_k: must be 1 to 3, given 0"),
    "top_k 4": (lambda c: c.update(top_k=4), "MIXTURE_INVALID", "given 4"),
    "top_k true": (lambda c: c.update(top_k=True), "MIXTURE_INVALID", "top_k"),
    "temperature 0": (lambda c: c.update(temperature=0), "MIXTURE_INVALID", "temperature"),
    "an enormous temperature": (lambda c: c.update(temperature=10**300), "MIXTURE_INVALID", "temperature"),
    "a level": (lambda c: c["router"].update(level="word"), "MIXTURE_INVALID", "router.level"),
    "normalize 1": (lambda c: c.update(normalize=1), "MIXTURE_INVALID", "normalize: must be true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_refused(
    name: str, server: LiveServer, experts: dict[str, str], sources: Sources, tmp_path: Path
) -> None:
    spoil, reason, says = BAD[name]
    path = write_mixture(sources.root / tmp_path.name, sources, experts)
    config = json.loads((path / mixture_files.CONFIG_FILE).read_text())
    spoil(config)
    (path / mixture_files.CONFIG_FILE).write_text(json.dumps(config))
    refused(lambda: server.client.register("wrong", path), "INVALID_ARGUMENT", reason, says)


def test_bad_files_are_refused(server: LiveServer, experts: dict[str, str], sources: Sources, tmp_path: Path) -> None:
    def refuse(spoil: Callable[[Path], object], reason: str, says: str, code: str = "INVALID_ARGUMENT") -> None:
        path = write_mixture(sources.root / tmp_path.name, sources, experts)
        spoil(path)
        refused(lambda: server.client.register("wrong", path), code, reason, says)
        shutil.rmtree(path)

    def weights(tensors: dict[str, torch.Tensor]) -> Callable[[Path], object]:
        return lambda path: safetensors_file.write(path / mixture_files.WEIGHTS_FILE, tensors, {})

    shape = (sources.base.num_layers, 3, sources.base.embedding_size)
    good = torch.randn(shape)
    refuse(lambda path: (path / mixture_files.WEIGHTS_FILE).unlink(), "SOURCE_NOT_FOUND", "mixture_router")
    refuse(lambda path: (path / mixture_files.CONFIG_FILE).unlink(), "SOURCE_NOT_FOUND", "adapter_config")
    refuse(lambda path: (path / mixture_files.CONFIG_FILE).write_text("[]"), "CONFIG_INVALID", "mixture_config.json")
    refuse(lambda path: (path / mixture_files.WEIGHTS_FILE).write_bytes(b"\x80\x04K\x01."), "HEADER_TOO_SHORT", "")
    refuse(weights({"router.weight": good, "other": good}), "TENSOR_UNKNOWN", "other")
    refuse(weights({"weight": good}), "TENSOR_UNKNOWN", "weight")
    refuse(weights({"router.weight": good[1:]}), "DIM_MISMATCH", "router.weight")
    refuse(weights({"router.weight": good[:, :, 1:]}), "DIM_MISMATCH", "router.weight")
    refuse(weights({"router.weight": good.log()}), "NON_FINITE", "router.weight")
    refuse(weights({"router.weight": good * 1e6}), "WEIGHT_OUT_OF_RANGE", "router.weight")

    def other_base(path: Path) -> None:
        config = json.loads((path / mixture_files.CONFIG_FILE).read_text())
        (path / mixture_files.CONFIG_FILE).write_text(json.dumps({**config, "base_digest": "0" * 64}))

    refuse(other_base, "BASE_MISMATCH", "base_digest", code="FAILED_PRECONDITION")


def test_the_order_in_the_file_means_nothing(
    server: LiveServer, mixed: str, experts: dict[str, str], sources: Sources, registered: Register, tmp_path: Path
) -> None:
    path = sources.root / tmp_path.name
    config = json.loads((path / mixture_files.CONFIG_FILE).read_text())
    weight = safetensors.torch.load_file(path / mixture_files.WEIGHTS_FILE)["router.weight"]
    config["experts"] = config["experts"][::-1]
    turned = sources.root / f"{tmp_path.name}-turned"
    turned.mkdir()
    (turned / mixture_files.CONFIG_FILE).write_text(json.dumps(config))
    safetensors_file.write(turned / mixture_files.WEIGHTS_FILE, {"router.weight": weight.flip(1)}, {})
    registered("turned", turned)
    assert server.client.tokens("turned", LONG, text=TEXT) == server.client.tokens(mixed, LONG, text=TEXT)
    told = [expert.digest for expert in server.client.get("turned").experts]
    assert told == sorted(told)


def test_steering_that_cannot_be_is_refused(server: LiveServer, mixed: str, experts: dict[str, str]) -> None:
    def refuse(field: str, adapter: str | None = mixed, reason: str = "STEERING_INVALID", **wanted: Any) -> None:
        steering = generation_pb2.Steering(**wanted)
        refused(lambda: server.client.generate(adapter, steering=steering), "INVALID_ARGUMENT", reason, field)

    bound = generation_pb2.GateBound
    refuse("steering: is for mixtures", None)
    refuse("steering: is for mixtures", "lora-1", restrict=["lora-1"])
    refuse("steering.restrict[1]: is no expert of mixed", restrict=["first", "lora-1"])
    refuse("steering.mask[0]: is no expert", mask=["f" * 64])
    refuse("steering.mask: must leave an expert", mask=list(experts.values()))
    refuse("steering.mask: must leave an expert", restrict=["first"], mask=["first"])
    refuse("steering.restrict[0]", reason="ID_INVALID", restrict=["First"])
    refuse("steering.bounds[0].floor", bounds=[bound(expert="first", floor=1.5)])
    refuse("steering.bounds[0].floor", bounds=[bound(expert="first", floor=float("nan"))])
    refuse("steering.bounds[0].ceiling", bounds=[bound(expert="first", floor=0.5, ceiling=0.25)])
    twice = [bound(expert="first", floor=0.5), bound(expert="first", ceiling=0.75)]
    refuse("steering.bounds[1].expert: must not be bounded twice", bounds=twice)


def test_bounds_are_seen_in_the_gates(
    server: LiveServer, experts: dict[str, str], sources: Sources, registered: Register, tmp_path: Path
) -> None:
    """A router with moderate logits: a gate that is 0 in float32 would take no share."""
    registered("mild", write_mixture(sources.root / tmp_path.name, sources, experts, scale=0.05))
    steering = generation_pb2.Steering(
        mask=["third"], bounds=[generation_pb2.GateBound(expert="first", floor=0.25, ceiling=0.25)]
    )
    finish = server.client.generate("mild", LONG, text=TEXT, options=GATES, steering=steering).finish
    means = {gate.adapter_id: list(gate.layer_means) for gate in finish.gates}
    layers = server.model.base.shape.num_layers
    assert means["third"] == [0.0] * layers
    assert means["first"] == pytest.approx([0.25] * layers)
    assert means["second"] == pytest.approx([0.75] * layers)


def test_what_prompts_share_is_told_apart_by_everything_that_makes_gates(
    server: LiveServer, mixed: str, experts: dict[str, str], sources: Sources, registered: Register, tmp_path: Path
) -> None:
    """The key has the mixture, the steering, and for a sequence-level router the whole prompt."""

    def cached(adapter: str, text: str = TEXT, **fields: Any) -> int:
        return server.client.generate(adapter, 1, text=text, **fields).finish.usage.cached_prompt_tokens

    wish = {"steering": generation_pb2.Steering(mask=["first"])}
    assert cached(mixed) == 0
    assert cached(mixed) > 0
    assert cached(mixed, TEXT[:-2]) > 0, "prompts with the same beginning share it"
    assert cached(mixed, **wish) == 0
    assert cached(mixed, **wish) > 0
    assert cached("first") == 0
    path = write_mixture(sources.root / f"{tmp_path.name}-s", sources, experts, level=Level.SEQUENCE, scale=20.0)
    registered("sequence", path)
    assert cached("sequence") == 0
    assert cached("sequence", TEXT[:-2]) == 0, "another prompt has other gates from its first token on"
    assert cached("sequence") > 0
    gates = server.client.generate("sequence", LONG, text=TEXT, options=GATES).finish.gates
    again = server.client.generate("sequence", 2, text=TEXT, cache_salt="new", options=GATES).finish.gates
    for one, other in zip(gates, again, strict=True):
        assert list(one.layer_means) == pytest.approx(list(other.layer_means), abs=1e-6), "the same for every token"


def test_a_stop_string_ends_the_answer_with_its_gates(server: LiveServer, mixed: str) -> None:
    text = server.client.generate(mixed, LONG, text=TEXT).text
    stopping = generation_pb2.Stopping(stop=[text[3]], max_new_tokens=LONG)
    finish = server.client.generate(mixed, text=TEXT, options=GATES, stopping=stopping).finish
    assert finish.stop_string == text[3]
    assert len(finish.gates) == 3
    assert all(gate.layer_means for gate in finish.gates)


def test_gates_are_told_to_their_caller_alone(
    server: LiveServer, mixed: str, experts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        finish = server.client.generate(mixed, LONG, text=TEXT, options=GATES).finish
    scraped = str(server.scrape())
    for gate in finish.gates:
        assert f"{gate.mean:.3f}" not in caplog.text
        assert gate.digest not in scraped
    for name in (mixed, *experts.values()):
        assert f'"{name}"' not in scraped
    plain = server.client.generate(mixed, LONG, text=TEXT).finish
    assert not plain.gates


def test_a_mixture_survives_a_restart(
    loop: Loop, server: LiveServer, experts: dict[str, str], mixed: str, tmp_path: Path
) -> None:
    """Even if its name sorts before its experts'."""
    wanted = server.client.tokens(mixed, LONG, text=TEXT)
    store = tmp_path / "store"
    for part in ("catalog", "versions"):  # beside sources of other tests, among them an endless file
        shutil.copytree(server.config.store / part, store / part)
    (store / "catalog" / "ia3-1.json").unlink()
    again = LiveServer(loop, replace(server.config, store=store))
    try:
        assert again.client.tokens(mixed, LONG, text=TEXT) == wanted
        assert [e.adapter_id for e in again.client.get(mixed).experts] == list(experts.values())
    finally:
        again.stop()


def test_a_router_that_makes_no_numbers_takes_its_mixture_out_of_service_and_no_expert(
    tight: LiveServer, sources: Sources, tmp_path: Path
) -> None:
    client = tight.client
    expert = client.register("expert", sources("ia3-31")).adapter.digest
    wanted = client.tokens("expert", 2)
    source = write_mixture(sources.root / tmp_path.name, sources, {expert: ""}, top_k=1, null_expert=True, scale=3e37)
    client.register("broken", source)
    refused(lambda: client.generate("broken", 2), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    wait_until(lambda: client.get("broken").state == adapter_pb2.ADAPTER_STATE_QUARANTINED)
    refused(lambda: client.generate("broken", 2), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED")
    assert client.tokens("expert", 2) == wanted
    client.unregister("broken")
    client.unregister("expert")


def test_a_mixture_that_can_never_fit_is_told_so(tight: LiveServer, sources: Sources, tmp_path: Path) -> None:
    """Two LoRAs fit here, and so does a mixture of two; one of three is refused at once instead of waiting for ever."""
    client = tight.client
    named = {f"many-{i}": client.register(f"many-{i}", sources(f"lora-4{i}")).adapter.digest for i in range(3)}
    for count in (2, 3):
        listed = {digest: name for name, digest in list(named.items())[:count]}
        client.register(f"mix-{count}", write_mixture(sources.root / f"{tmp_path.name}{count}", sources, listed))
    assert len(client.tokens("mix-2", 2)) == 2
    refused(lambda: client.generate("mix-3", 2), "RESOURCE_EXHAUSTED", "POOL_EXHAUSTED")
    for name in ("mix-2", "mix-3", *named):
        client.unregister(name)


def test_under_changes_every_answer_is_of_what_it_names_or_fails_by_name(
    server: LiveServer, mixed: str, experts: dict[str, str], sources: Sources, tmp_path: Path
) -> None:
    """Callers keep sending requests while routers are replaced and an expert comes and goes; nothing is left behind."""
    client = server.client
    routers = [sources.root / tmp_path.name]
    routers.append(write_mixture(sources.root / f"{tmp_path.name}-other", sources, experts, seed=7, scale=4.0))
    wanted = {}
    for router in reversed(routers):
        client.register(mixed, router, replace=True)
        answer = client.generate(mixed, 4, text=TEXT)
        wanted[answer.finish.effective_adapters[0].digest] = answer.tokens
    assert len({tuple(tokens) for tokens in wanted.values()}) == 2, "negative control"
    has_ended, answered, failed = threading.Event(), [], []

    def ask() -> None:
        while not has_ended.is_set():
            try:
                answer = client.generate(mixed, 4, text=TEXT)
            except grpc.RpcError as error:
                failed.append(failure_of(error))
            else:
                answered.append((answer.finish.effective_adapters[0].digest, answer.tokens))

    with ThreadPoolExecutor() as pool:
        callers = [pool.submit(ask) for _ in range(4)]
        for turn in range(6):
            client.register(mixed, routers[turn % 2], replace=True)
            seen = len(answered)
            wait_until(lambda seen=seen: len(answered) > seen + 1)
            client.unregister("second", mode="UNREGISTER_MODE_CANCEL" if turn % 2 else "UNREGISTER_MODE_DRAIN")
            seen = len(failed)
            wait_until(lambda seen=seen: len(failed) > seen)
            client.register("second", sources("lora-22"))
        has_ended.set()
        for caller in callers:
            caller.result()
    assert {digest for digest, _ in answered} == wanted.keys()
    assert all(tokens == wanted[digest] for digest, tokens in answered)
    assert {failure.reason for failure in failed} <= {"EXPERT_UNAVAILABLE", "ADAPTER_UNREGISTERED"}
    assert all("second" in failure.message for failure in failed)
