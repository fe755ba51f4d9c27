"""Streams over a channel: tokens between the first and the last come together, once the interval has passed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.server.live import LiveServer, Loop
from weft.config import EngineConfig, WeftConfig


@pytest.fixture(scope="module", params=[1e6, 0.0], ids=["never", "at once"])
def paced(
    request: pytest.FixtureRequest, loop: Loop, config: WeftConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, bool]]:
    engine = EngineConfig(stream_interval_s=request.param)
    live = LiveServer(loop, replace(config, store=tmp_path_factory.mktemp("paced"), engine=engine))
    yield live, request.param > 0
    live.stop()


def test_tokens_come_together_or_step_by_step(paced: tuple[LiveServer, bool]) -> None:
    live, is_paced = paced
    wanted = live.client.tokens(None, 6)
    with live.gate.held():
        stream = live.client.stream(None, 6)
        live.gate.let(1)
        stream.wait_tokens(1)  # the first does not wait
        for count in (2, 3, 4):
            live.gate.let(1)
            if not is_paced:
                stream.wait_tokens(count)
        assert stream.tokens == wanted[: 1 if is_paced else 4]
    assert stream.result().tokens == wanted, "the end brings what there is"
