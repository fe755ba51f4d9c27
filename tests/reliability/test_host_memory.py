"""Packed adapters on their way to the device count against the host's budget, and no request starves for it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch import Tensor

from tests import tiny
from tests.engine.fakes import UNIT_BYTES, FakeAdapter, Harness
from tests.server.files import Parts
from tests.server.live import LiveServer, Loop
from weft.config import EngineConfig, ModelConfig, ResidencyConfig, ServerConfig, WeftConfig
from weft.engine.request import SamplingParams
from weft.engine.residency import Residency
from weft.kernels.step import Step
from weft.metrics import Metrics

METRICS = Metrics()
SHORT = SamplingParams(temperature=0.0, max_new_tokens=3)


def run(h: Harness, *, at_once: int) -> int:
    """Run to the end, with `at_once` loads ending between two steps; return the most bytes that were on their way."""
    peak = 0
    for _ in range(4000):
        for _ in range(min(at_once, len(h.loads))):
            h.answer_load(h.loads[0])
        h.turn()
        on_the_way = h.engine.residency._on_the_way()
        peak = max(peak, sum(on_the_way.values()))
        assert h.loader.reserved == on_the_way or not h.unfinished
        if not h.unfinished and not h.loads:
            return peak
    raise AssertionError(h.unfinished)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("at_once", [1, 100])
def test_what_waits_for_room_stays_within_the_budget(known: bool, at_once: int) -> None:
    """T24: 200 requests, each for an adapter of its own."""
    h = Harness(
        metrics=METRICS, num_blocks=400, max_num_seqs=4, capacity_bytes=4 * UNIT_BYTES, host_bytes=8 * UNIT_BYTES
    )
    adapters = [FakeAdapter(1 + index) for index in range(200)]
    if not known:
        h.loader.sizes = dict.fromkeys((adapter.digest for adapter in adapters), 0)
    for index, adapter in enumerate(adapters):
        h.submit([index % 30], adapter, params=SHORT)
    assert run(h, at_once=at_once) <= 8 * UNIT_BYTES
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    h.assert_answers()


def test_without_the_budget_all_of_them_would_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: this is what the count above is there to see."""
    monkeypatch.setattr(Residency, "_may_load", lambda self, size_bytes: True)
    h = Harness(metrics=METRICS, max_num_seqs=4, capacity_bytes=4 * UNIT_BYTES, host_bytes=8 * UNIT_BYTES)
    for index in range(60):
        h.submit([index % 30], FakeAdapter(1 + index), params=SHORT)
    assert run(h, at_once=100) > 50 * UNIT_BYTES


def test_loads_begin_in_the_order_of_their_requests() -> None:
    h = Harness(metrics=METRICS, max_num_seqs=1, capacity_bytes=UNIT_BYTES, host_bytes=2 * UNIT_BYTES)
    adapters = [FakeAdapter(1 + index) for index in range(6)]
    for adapter in adapters:
        h.submit([1], adapter, params=SHORT)
    begun: list[object] = []
    while h.unfinished:
        h.turn()
        begun += [digest for digest in h.loads if digest not in begun]
        if h.loads:
            h.answer_load(h.loads[0])
    assert begun == [adapter.digest for adapter in adapters]


@pytest.mark.parametrize("units", [0, 1, 2, 3])
def test_requests_of_more_than_the_budget_still_start(units: int) -> None:
    """One load may always go on: a request of four adapters needs them all at once."""
    h = Harness(metrics=METRICS, max_num_seqs=2, capacity_bytes=4 * UNIT_BYTES, host_bytes=units * UNIT_BYTES)
    for index in range(0, 24, 4):
        h.submit([index], *(FakeAdapter(1 + index + part) for part in range(4)), params=SHORT)
        h.submit([index], FakeAdapter(100 + index), params=SHORT)
    assert run(h, at_once=2) <= (units + 4) * UNIT_BYTES
    assert {h.reason(request) for request in h.requests.values()} == {"length"}
    h.assert_answers()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, list[str]]]:
    """Yield a server with room for four adapters on the device and for four on the host, and the ids of forty."""
    loop = Loop()
    config = WeftConfig(
        model=ModelConfig(path=tiny.save_base(tmp_path_factory.mktemp("base") / "tiny"), device="cpu", num_threads=1),
        engine=EngineConfig(max_num_seqs=4, num_kv_blocks=60, max_model_len=64),
        store=tmp_path_factory.mktemp("store"),
        allowed_sources=(tmp_path_factory.mktemp("sources"),),
        server=ServerConfig(port=0, metrics_port=0),
    )
    first = LiveServer(loop, config)
    shape, ids = first.model.base.shape, []
    for seed in range(40):
        source = config.allowed_sources[0] / f"lora-{seed}"
        Parts.of(tiny.random_lora(shape, rank=8, seed=seed), shape).files().write(source)
        first.client.register(f"lora-{seed}", source)
        ids.append(f"lora-{seed}")
    packed_bytes = first.client.get("lora-0").resident_bytes
    first.stop()
    memory = ResidencyConfig(device_bytes=4 * packed_bytes, host_bytes=4 * packed_bytes)
    live = LiveServer(loop, replace(config, residency=memory))
    yield live, ids
    live.stop()
    loop.close()


def test_the_host_cache_and_what_is_on_its_way_share_the_budget(crowded: tuple[LiveServer, list[str]]) -> None:
    """T24 with the real loader: every packed adapter outside of the device is counted, once."""
    live, ids = crowded
    residency, loader = live.application.engine.residency, live.application.engine._loader
    peaks: list[int] = []
    forward = live.runner.forward

    def count(step: Step) -> Tensor:
        with loader._lock:
            held = {id(packed): packed.size_bytes for packed in loader.host._packed_adapters.values()}
        held |= {id(packed): packed.size_bytes for packed in residency._arrived.values()}
        peaks.append(sum(held.values()))
        return forward(step)

    live.runner.forward = count
    try:
        with ThreadPoolExecutor(len(ids)) as threads:
            answers = list(threads.map(lambda name: live.client.tokens(name, 12, text="hello"), ids))
    finally:
        live.runner.forward = forward
    assert len(peaks) > 40
    assert 0 < max(peaks) <= live.config.residency.host_bytes
    assert len({tuple(answer) for answer in answers}) > 30, "each of its own adapter"
