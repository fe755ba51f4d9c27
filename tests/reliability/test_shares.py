"""Shares of what there is one of: the device's memory, and the batch. Attacks by callers that are let in."""

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.access.callers import client_of
from tests.access.conftest import stored
from tests.reliability.attacks import DEMO_ADAPTERS, Target, outcome
from tests.server.files import Files, upload_messages
from tests.server.live import Client
from weft.api.access import token_file
from weft.api.access.token import Token
from weft.v1 import generation_pb2
from weft.v1.adapter_files import PEFT_FILES

pytestmark = pytest.mark.xdist_group("reliability-shares")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    """Yield a function that starts a server on one store, after the one before has ended."""
    started: list[Target] = []

    def start(*flags: str, **options: object) -> Target:
        for target in started:
            target.close()
        started.append(Target(tmp_path / "store", *flags, **options))  # pyright: ignore[reportArgumentType]
        return started[-1]

    yield start
    for target in started:
        target.close()


def _copy(name: str, revision: int) -> Files:
    """Return an adapter with content of its own, which acts as the one of this name."""
    config = json.loads((DEMO_ADAPTERS / name / PEFT_FILES.config).read_bytes())
    weights = (DEMO_ADAPTERS / name / PEFT_FILES.weights).read_bytes()
    return Files(json.dumps({**config, "revision": str(revision)}).encode(), weights)


def _pinned_until_refused(client: Client, name: str) -> tuple[int, str]:
    """Pin copies of an adapter; return how many were taken, and how the next one ended."""
    for number in range(100):
        messages = upload_messages(f"{name}-{number}", _copy(name, number), pin=True)
        ended = outcome(lambda messages=messages: client.upload(messages))
        if ended != "OK":
            return number, ended
    raise AssertionError("nothing was refused")


def test_t18_pins_leave_room_for_others(start: Callable[..., Target]) -> None:
    """Row 105. Before: five LoRAs and two IA³ filled the device, for good, and all others got POOL_EXHAUSTED."""
    flags = ("--adapter-device-bytes", "1MiB")
    target = start(*flags, adapters=["upper-lora"])
    for name in ("reverse-lora", "upper-ia3"):
        taken, ended = _pinned_until_refused(target.client, name)
        assert taken >= 1
        assert ended == "RESOURCE_EXHAUSTED/PINS_FULL"
    answer = target.client.tokens("upper-lora", 4, text="hello world")
    again = start(*flags)
    assert again.client.tokens("upper-lora", 4, text="hello world") == answer


def test_t20_a_tenant_with_a_crowd_leaves_others_their_share(start: Callable[..., Target], tmp_path: Path) -> None:
    """Before: beside a client with 330 outstanding requests, a victim got 0 of 50 answers."""
    tokens = tmp_path / "tokens.json"
    crowd, victim = Token.new(), Token.new()
    token_file.add(tokens, stored(crowd, "crowd"))
    token_file.add(tokens, stored(victim, "victim"))
    target = start("--token-file", str(tokens))
    many, one = client_of(target.port, crowd), client_of(target.port, victim)
    ends = threading.Event()
    outcomes: list[str] = []
    request = many.request(text="x", stopping=generation_pb2.Stopping(max_new_tokens=480, ignore_eos=True))

    def keep_one_outstanding() -> None:
        while not ends.is_set():
            outcomes.append(outcome(lambda: many.generation.Generate(request, timeout=60)))
            if outcomes[-1] != "OK":
                time.sleep(0.2)

    def first_token_s() -> float:
        begun_s = time.monotonic()
        stream = one.stream(text="hello world", num_tokens=8)
        stream.wait_tokens(1)
        waited_s = time.monotonic() - begun_s
        assert len(stream.result().tokens) == 8
        return waited_s

    alone = statistics.median(first_token_s() for _ in range(5))
    threads = [threading.Thread(target=keep_one_outstanding, daemon=True) for _ in range(330)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    beside = [first_token_s() for _ in range(5)]
    ends.set()
    print(f"time to first token: alone {alone * 1e3:.0f} ms, beside a crowd {statistics.median(beside) * 1e3:.0f} ms")
    assert "RESOURCE_EXHAUSTED/QUEUE_FULL" in outcomes, "the crowd wants more than its places"
    assert target.metric("weft_requests_running") >= 60, "the batch is full"
