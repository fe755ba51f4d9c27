"""Adapters that come and go while others answer: no wrong token, nothing left over, nothing that grows.

A sixteenth of the numbers by which the promises are judged; `make soak` has all of them (WEFT_SOAK=1).
"""

import os
import random
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from tests.reliability.attacks import DEMO_ADAPTERS, DEMO_BASE, Memory, Target, memory_of, outcome, together
from tests.server.files import Files, upload_messages
from tests.server.live import WAIT_S, Client, LiveServer, Loop
from weft.adapters.registry import Registry, Version
from weft.client.failure import failure_of
from weft.config import MIB, ModelConfig, ResidencyConfig, ServerConfig, WeftConfig
from weft.v1 import generation_pb2
from weft.v1.adapter_files import PEFT_FILES

pytestmark = pytest.mark.xdist_group("reliability-churn")

SOAK = bool(os.environ.get("WEFT_SOAK"))
NUM_CHANGES, NUM_CYCLES = (32 * 1024, 10_000) if SOAK else (32 * 1024 // 16, 10_000 // 16)
NUM_CHANGERS, NUM_STREAMERS, NUM_IDS = 32, 64, 6
CONTENTS = ("reverse-lora", "upper-lora", "caesar-lora", "zigzag-lora", "upper-ia3", "caesar-ia3", "upper-prefix")
NUM_TOKENS = 16
TEXT = "hello world"
SLOPE_MAX = 1.0 if SOAK else 8.0  # MiB per 1,000 cycles; a short run is mostly noise
LEAK_BYTES = 32 * 1024  # of each cycle of the negative control
ALLOWED = {"NOT_FOUND", "ABORTED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}


def _answer(client: Client, adapter_id: str, salt: str = "") -> tuple[str, list[int]]:
    """Return the digest that an answer names, and its tokens."""
    stopping = generation_pb2.Stopping(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    answer = client.generate(adapter_id, text=TEXT, stopping=stopping, cache_salt=salt)
    return answer.finish.effective_adapters[0].digest, answer.tokens


class Churn(NamedTuple):
    """What a churn saw: changes by outcome, streams by outcome, and the digests of wrong answers."""

    changes: Counter[str]
    streams: Counter[str]
    wrong: list[str]


def churn(target: Target, right: dict[str, list[int]], num_changes: int) -> Churn:
    """Change a few ids at random from many clients, and stream from them all the while."""
    seen, ends, lock = Churn(Counter(), Counter(), []), threading.Event(), threading.Lock()
    ids = [f"hot-{number}" for number in range(NUM_IDS)]

    def change(seed: int) -> None:
        client, choices = target.connect(), random.Random(seed)
        for _ in range(num_changes // NUM_CHANGERS):
            adapter_id, source = choices.choice(ids), DEMO_ADAPTERS / choices.choice(CONTENTS)
            kind = choices.choices(("replace", "unregister"), (85, 15))[0]
            call = partial(client.unregister, adapter_id, allow_missing=True)
            if kind == "replace":
                call = partial(client.register, adapter_id, source, replace=True)
            ended = outcome(call)
            with lock:
                seen.changes[f"{kind} {ended}"] += 1

    def stream(seed: int) -> None:
        client, choices = target.connect(), random.Random(seed)
        while not ends.is_set():
            try:
                digest, tokens = _answer(client, choices.choice(ids))
            except grpc.RpcError as error:
                with lock:
                    seen.streams[failure_of(error).code.name] += 1
                continue
            with lock:
                seen.streams["OK"] += 1
                if right[digest] != tokens:
                    seen.wrong.append(digest)

    streamers = [threading.Thread(target=stream, args=[seed]) for seed in range(NUM_STREAMERS)]
    for thread in streamers:
        thread.start()
    together([lambda seed=seed: change(1000 + seed) for seed in range(NUM_CHANGERS)])
    ends.set()
    for thread in streamers:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a stream without an end"
    return seen


def test_churn(tmp_path: Path) -> None:
    """P1, P2: each finished stream equals the answer of the content that its end names; every call ends."""
    flags = ("--adapter-device-bytes", "2MiB", "--adapter-host-bytes", "2MiB")
    target = Target(tmp_path / "store", *flags)
    try:
        right: dict[str, list[int]] = {}
        for name in CONTENTS:
            target.client.register(name, DEMO_ADAPTERS / name)
            digest, right[digest] = _answer(target.client, name, salt=name)
        assert len({tuple(tokens) for tokens in right.values()}) == len(CONTENTS), "negative control: answers differ"
        seen = churn(target, right, NUM_CHANGES)
        print(f"{dict(seen.changes)}, streams {dict(seen.streams)}")
        assert seen.wrong == []
        assert seen.streams["OK"] > 100
        assert set(seen.streams) <= ALLOWED | {"OK"}
        assert {ended.split()[1].split("/")[0] for ended in seen.changes} <= ALLOWED | {"OK"}
        for gauge in ("weft_requests_running", "weft_requests_waiting"):
            assert target.metric(gauge) == 0
        assert target.metric("weft_requests_total") == sum(
            target.metric("weft_requests_total", finish_reason=reason)
            for reason in ("stop", "length", "cancelled", "error")
        )
        assert not list((tmp_path / "store" / "staging").iterdir())
    finally:
        target.close()


def test_the_comparison_sees_a_wrong_answer(tmp_path: Path) -> None:
    """Negative control: with one content's answer written down wrongly, the same churn finds it."""
    target = Target(tmp_path / "store")
    try:
        right: dict[str, list[int]] = {}
        for name in CONTENTS:
            target.client.register(name, DEMO_ADAPTERS / name)
            digest, right[digest] = _answer(target.client, name, salt=name)
        right[digest] = right[digest][::-1]
        assert digest in churn(target, right, 10 * NUM_CHANGERS).wrong
    finally:
        target.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = WeftConfig(
        model=ModelConfig(path=DEMO_BASE, num_threads=1),
        store=tmp_path_factory.mktemp("cycles"),
        allowed_sources=(DEMO_ADAPTERS,),
        residency=ResidencyConfig(device_bytes=2 * MIB, host_bytes=2 * MIB),
        server=ServerConfig(port=0, metrics_port=0),
    )
    loop = Loop()
    live = LiveServer(loop, config)
    yield live
    live.stop()
    loop.close()


def _cycles(live: LiveServer, count: int) -> list[Memory]:
    """Register or upload, generate, unregister, over and over; return the process's memory after each cycle."""
    samples = []
    for number in range(count):
        adapter_id, name = f"cycle-{number % 37}", CONTENTS[number % len(CONTENTS)]
        if number % 2:
            files = Files(*((DEMO_ADAPTERS / name / file).read_bytes() for file in PEFT_FILES))
            live.client.upload(upload_messages(adapter_id, files))
        else:
            live.client.register(adapter_id, DEMO_ADAPTERS / name)
        assert live.client.tokens(adapter_id, 4, text=TEXT)
        live.client.unregister(adapter_id)
        samples.append(memory_of(os.getpid()))
    return samples


def _slope(samples: list[Memory]) -> float:
    """Return the growth of the memory in MiB per 1,000 cycles, by least squares."""
    return 1000 * statistics.linear_regression(range(len(samples)), [sample.rss_mib for sample in samples]).slope


def test_cycles_leave_nothing(live: LiveServer) -> None:
    """P19: memory, descriptors, threads and stored files stay as they are."""
    _cycles(live, 200)  # until everything is warm
    before = memory_of(os.getpid())
    samples = _cycles(live, NUM_CYCLES)
    print(f"{_slope(samples):+.2f} MiB per 1,000 cycles of {NUM_CYCLES}")
    assert _slope(samples) < SLOPE_MAX
    after = memory_of(os.getpid())
    assert abs(after.num_descriptors - before.num_descriptors) <= 4
    assert abs(after.num_threads - before.num_threads) <= 4
    assert not list((live.config.store / "versions").iterdir())
    assert not list((live.config.store / "staging").iterdir())
    assert live.kv_blocks_used() == 0


def test_a_leak_is_seen(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: 32 KiB that stay with every adapter that leaves."""
    kept: list[bytearray] = []
    remove: Callable[[Registry, Version], bool] = Registry.remove

    def leaking(registry: Registry, version: Version) -> bool:
        kept.append(bytearray(os.urandom(LEAK_BYTES)))
        return remove(registry, version)

    monkeypatch.setattr(Registry, "remove", leaking)
    assert _slope(_cycles(live, 200)) > SLOPE_MAX
    assert len(kept) == 200
