"""No message takes the event loop for long, or much memory, whichever field it is full of.

The messages come from the descriptors (tests/reliability/wire.py), so that a new field is tested without a new test.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator

import grpc
import pytest

from tests.reliability import wire
from tests.reliability.attacks import DEMO_BASE
from tests.reliability.wire import Bomb
from tests.server.live import WAIT_S, LiveServer, Loop
from weft.api.bounds import Bounds, bounds_of
from weft.client.failure import failure_of
from weft.config import MIB, ModelConfig, ServerConfig, WeftConfig
from weft.errors import InvalidRequest

pytestmark = pytest.mark.xdist_group("reliability-messages")

_CPU_S_MAX = 0.05
_BYTES_MAX = 12 * MIB  # of Python objects, for a message of little more than 1 MiB
_BOMBS = {str(bomb): bomb for bomb in wire.bombs(ServerConfig().receive_bytes_max - 300)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WeftConfig:
    return WeftConfig(
        model=ModelConfig(path=DEMO_BASE, num_threads=1),
        store=tmp_path_factory.mktemp("bombed"),
        server=ServerConfig(port=0, metrics_port=0),
    )


@pytest.fixture(scope="module")
def bombed(config: WeftConfig) -> Iterator[LiveServer]:
    """Yield a server with a loop of its own, whose thread's time is measured."""
    loop = Loop()
    live = LiveServer(loop, config)
    yield live
    live.stop()
    loop.close()


def _send(bomb: Bomb, channel: grpc.Channel) -> str:
    """Send the message; return the status, with the text of an error."""
    path, streams_requests, streams_responses = bomb.method.path, *bomb.method[2:]
    try:
        if streams_requests:
            channel.stream_unary(path)(iter([bomb.data]), timeout=WAIT_S)
        elif streams_responses:
            for _ in channel.unary_stream(path)(bomb.data, timeout=0.5 if "Watch" in path else WAIT_S):
                pass
        else:
            channel.unary_unary(path)(bomb.data, timeout=WAIT_S)
    except grpc.RpcError as error:
        failure = failure_of(error)
        return f"{failure.code.name} {failure.reason} {failure.message}"
    return "OK"


def _cpu_s(live: LiveServer, call: Callable[[], object]) -> float:
    """Return the time that the event loop's thread computes until `call` has returned, the least of three."""
    clock = time.pthread_getcpuclockid(live.loop.ident)
    spent = []
    for _ in range(3):
        before = time.clock_gettime(clock)
        call()
        spent.append(time.clock_gettime(clock) - before)
        if spent[-1] < _CPU_S_MAX:
            break
    return min(spent)


@pytest.mark.parametrize("name", _BOMBS)
def test_a_message_full_of_one_field(name: str, bombed: LiveServer) -> None:
    """Rows 101, 102: the loop's thread computes for at most 50 ms, and a repeated field is refused by its name."""
    bomb = _BOMBS[name]
    outcomes: list[str] = []
    spent_s = _cpu_s(bombed, lambda: outcomes.append(_send(bomb, bombed.client.channel)))
    assert spent_s < _CPU_S_MAX, outcomes
    if bomb.is_repeated:
        field = bomb.path.rpartition(".")[2]
        assert outcomes[0].startswith("INVALID_ARGUMENT"), outcomes
        assert field in outcomes[0], outcomes


def test_a_message_makes_few_objects(bombed: LiveServer) -> None:
    """The worst messages of all, one after another, each by the memory of the Python objects that live at a time."""
    peaks = {}
    for name, bomb in _BOMBS.items():
        if bomb.is_repeated or bomb.field is None:
            tracemalloc.start()
            _send(bomb, bombed.client.channel)
            peaks[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert max(peaks.values()) < _BYTES_MAX, peaks


def test_the_clock_sees_what_a_bomb_costs_without_bounds(bombed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without bounds, the same message is seen to block the loop and to fill the memory."""
    monkeypatch.setattr(Bounds, "_steps", lambda self, descriptor: [])
    bomb = _BOMBS["Generate-composition.adapters"]
    clock = time.pthread_getcpuclockid(bombed.loop.ident)
    before = time.clock_gettime(clock)
    tracemalloc.start()
    _send(bomb, bombed.client.channel)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.clock_gettime(clock) - before > _CPU_S_MAX
    assert peak > _BYTES_MAX


@pytest.mark.parametrize(
    ("method", "path", "fields"), [pytest.param(*one, id=f"{one[0].path}-{one[1]}") for one in wire.repeated()]
)
def test_every_repeated_field_has_a_bound(method, path: str, fields, config: WeftConfig) -> None:
    """As many entries as the bound allows pass, one more does not; the bound is the one that the error names."""
    bounds = bounds_of(config.requests, config.adapters, max_model_len=256)
    with pytest.raises(InvalidRequest) as refused:
        bounds.require(wire.parsed(method, wire.with_entries(fields, 100_000)))
    most = int(refused.value.metadata["limit"])
    bounds.require(wire.parsed(method, wire.with_entries(fields, most)))
    with pytest.raises(InvalidRequest, match="has too many entries") as refused:
        bounds.require(wire.parsed(method, wire.with_entries(fields, most + 1)))
    assert refused.value.metadata["given"] == str(most + 1)
