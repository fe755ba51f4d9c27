"""Numbers that are not finite are charged to adapters that make them alone, durably, and to no other."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.conftest import Sources
from tests.server.conftest import base_path as base_path
from tests.server.files import Parts
from tests.server.live import LiveServer, Loop, refused, wait_until
from tests.server.test_metrics import change_of
from weft.config import AdapterLimits, EngineConfig, ModelConfig, ServerConfig, WeftConfig
from weft.v1 import adapter_pb2, generation_pb2

ACTIVE, QUARANTINED = adapter_pb2.ADAPTER_STATE_ACTIVE, adapter_pb2.ADAPTER_STATE_QUARANTINED
TEXT = "hello world"
TOGETHER, LARGE = 4, 1e19  # adapters that overflow only together, and the factor of their matrices


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def config(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> WeftConfig:
    return WeftConfig(
        model=ModelConfig(path=base_path, device="cpu", dtype="bfloat16", num_threads=1),
        engine=EngineConfig(max_num_seqs=4, max_queued_requests=4, num_kv_blocks=60, max_model_len=240),
        adapters=AdapterLimits(weight_abs_max=3e38),
        store=tmp_path_factory.mktemp("store"),
        allowed_sources=(tmp_path_factory.mktemp("sources"),),
        server=ServerConfig(port=0, metrics_port=0),
    )


@pytest.fixture(scope="module")
def live(loop: Loop, config: WeftConfig) -> Iterator[LiveServer]:
    server = LiveServer(loop, config)
    yield server
    server.stop()


@pytest.fixture
def sources(live: LiveServer) -> Sources:
    return Sources(live.config.allowed_sources[0], live.model.base.shape)


@pytest.fixture
def registered(live: LiveServer, sources: Sources) -> Iterator[Callable[..., str]]:
    """Yield a function that registers an adapter until the test ends; `scale` multiplies the B of a LoRA."""
    ids: list[str] = []

    def register(adapter_id: str, name: str, scale: float = 1.0) -> str:
        source = sources(name) if scale == 1.0 else _scaled(sources.parts(name), scale, sources.root / f"{name}-large")
        live.client.register(adapter_id, source)
        ids.append(adapter_id)
        return adapter_id

    yield register
    for adapter_id in ids:
        live.client.unregister(adapter_id, allow_missing=True)
    wait_idle(live)


def _scaled(parts: Parts, scale: float, path: Path) -> Path:
    tensors = {name: t * scale if "lora_B" in name else t for name, t in parts.tensors.items()}
    return parts.with_tensors(tensors).write(path)


def of(weights: Mapping[str, float]) -> dict[str, Any]:
    parts = [generation_pb2.WeightedAdapter(adapter_id=name, weight=weight) for name, weight in weights.items()]
    return {"composition": generation_pb2.Composition(adapters=parts), "text": TEXT}


def states(live: LiveServer) -> dict[str, Any]:
    return {adapter.adapter_id: adapter.state for adapter in live.client.list().adapters}


def wait_idle(live: LiveServer) -> None:
    """Wait until no request and no trial is inside."""
    wait_until(lambda: not any(version.leases for version in live.application.lifecycle.registry))
    live.wait_idle()


def overflow(live: LiveServer, **weights: float) -> None:
    refused(
        lambda: live.client.generate(None, 4, **of(weights)), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE", retry=False
    )
    wait_idle(live)


def test_only_the_adapter_that_fails_alone_is_charged(live: LiveServer, registered: Callable[..., str]) -> None:
    """T6: a stranger's composition does not take a colleague's adapter out of service."""
    registered("victim", "lora-1"), registered("beside", "ia3-3"), registered("absent", "ia3-4")
    registered("poison", "lora-5", scale=1e30)
    wanted = live.client.tokens("victim", 6)
    overflow(live, poison=1.0, victim=1e-6, beside=0.5, absent=0.0)
    wait_until(lambda: states(live)["poison"] == QUARANTINED)
    assert {name for name, state in states(live).items() if state != ACTIVE} == {"poison"}
    assert live.client.tokens("victim", 6, cache_salt="after") == wanted
    refused(lambda: live.client.generate("poison"), "FAILED_PRECONDITION", "ADAPTER_QUARANTINED", "LiftQuarantine")


def test_adapters_that_overflow_only_together_stay(live: LiveServer, registered: Callable[..., str]) -> None:
    """T6 with all the weights at their limits: each of them answers alone."""
    names = [registered(f"large-{index}", f"lora-{20 + index}", scale=LARGE) for index in range(TOGETHER)]
    alone = {name: live.client.tokens(name, 3, text=TEXT) for name in names}
    for _ in range(3):
        overflow(live, **dict.fromkeys(names, 4.0))
    assert set(states(live).values()) == {ACTIVE}
    assert {name: live.client.tokens(name, 3, text=TEXT, cache_salt="after") for name in names} == alone


def test_a_trial_is_counted_by_no_metric(live: LiveServer, registered: Callable[..., str]) -> None:
    """The conservation of requests: what was accepted has ended, and nothing else."""
    registered("victim", "lora-1"), registered("poison", "lora-6", scale=1e30)
    with change_of(live) as change:
        overflow(live, poison=1.0, victim=0.5)
        wait_until(lambda: states(live)["poison"] == QUARANTINED)
    assert change("weft_requests_total", finish_reason="error") == 1
    assert change("weft_nonfinite_rows_total") == 1
    for reason in ("stop", "length", "cancelled"):
        assert change("weft_requests_total", finish_reason=reason) == 0


def test_a_quarantine_survives_a_restart_until_it_is_lifted(
    loop: Loop, config: WeftConfig, live: LiveServer, sources: Sources, tmp_path: Path
) -> None:
    moved = replace(config, store=tmp_path / "store")
    first = LiveServer(loop, moved)
    poison = _scaled(sources.parts("lora-7"), 1e30, sources.root / "durable")
    digest = first.client.register("poison", poison).adapter.digest
    first.client.register("twin", poison)
    refused(lambda: first.client.generate("poison", text=TEXT), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    wait_until(lambda: set(states(first).values()) == {QUARANTINED})
    catalog = moved.store / "catalog"
    wait_until(lambda: all("ADAPTER_NON_FINITE" in path.read_text() for path in catalog.glob("*.json")))
    first.stop()
    second = LiveServer(loop, moved)
    try:
        assert set(states(second).values()) == {QUARANTINED}, "content is quarantined, under every id"
        assert second.client.get("poison").state_reason == "ADAPTER_NON_FINITE"
        for call in (
            lambda: second.client.register("poison", poison),
            lambda: second.client.generate("twin"),
        ):
            refused(call, "FAILED_PRECONDITION", "ADAPTER_QUARANTINED", "LiftQuarantine", retry=False)
        refused(lambda: second.client.lift("nobody"), "NOT_FOUND", "ADAPTER_NOT_FOUND")
        refused(lambda: second.client.lift("poison", expected_digest="0" * 64), "ABORTED", "VERSION_CONFLICT")
        for _ in range(2):  # the second call changes nothing
            lifted = second.client.lift("poison", expected_digest=digest)
            assert (lifted.state, lifted.state_reason, lifted.method) == (ACTIVE, "", "lora")
        assert states(second) == {"poison": ACTIVE, "twin": QUARANTINED}
        refused(lambda: second.client.generate("poison", text=TEXT), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
        wait_until(lambda: states(second)["poison"] == QUARANTINED)
    finally:
        second.stop()


def test_unregistering_does_not_wait_for_a_trial(live: LiveServer, registered: Callable[..., str]) -> None:
    registered("victim", "lora-1"), registered("poison", "lora-8", scale=1e30)
    with live.gate.held():
        stream = live.client.stream(None, 4, **of({"poison": 1.0, "victim": 0.5}))
        live.gate.let(1)
        refused(lambda: stream, "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
        wait_until(lambda: any(version.leases for version in live.application.lifecycle.registry))
        removing = live.loop.start(
            live.application.lifecycle.unregister("poison", cancel=True, timeout_s=0.0, expected_digest=None)
        )
        wait_until(lambda: "poison" not in states(live) or states(live)["poison"] != ACTIVE)
    assert removing.result(20.0)  # the trial of one probe may last 30 s
    wait_idle(live)
    assert states(live) == {"victim": ACTIVE}


def test_no_trial_while_the_queue_is_full(live: LiveServer, registered: Callable[..., str]) -> None:
    registered("poison", "lora-9", scale=1e30), registered("sound", "lora-1")
    with live.gate.held():
        stream = live.client.stream("poison", 4, text=TEXT)
        others = [live.client.stream(adapter_id, 4) for adapter_id in (None, "sound") * 3]
        others.append(live.client.stream(None, 4))
        admission = live.application.requests.admission
        wait_until(lambda: admission.num_requests == 8)
    refused(lambda: stream, "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    assert all(len(other.result().tokens) == 4 for other in others)
    wait_idle(live)
    assert states(live)["poison"] == ACTIVE
    refused(lambda: live.client.generate("poison", text=TEXT), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    wait_until(lambda: states(live)["poison"] == QUARANTINED)


def test_a_base_that_fails_charges_nobody(live: LiveServer, registered: Callable[..., str]) -> None:
    registered("victim", "lora-1")
    real = live.runner.forward
    live.runner.forward = lambda step: torch.full_like(real(step), float("nan"))
    try:
        refused(lambda: live.client.generate("victim", text=TEXT), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
        refused(lambda: live.client.generate(None, text=TEXT), "INTERNAL", "NON_FINITE")
        wait_idle(live)
    finally:
        live.runner.forward = real
    assert states(live) == {"victim": ACTIVE}
