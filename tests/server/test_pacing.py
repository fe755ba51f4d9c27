"""Streams of a server with default settings: tokens come together, none is lost, and the first one waits for nobody."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.server.live import LiveServer, Loop
from weft.config import EngineConfig, WeftConfig


@pytest.fixture(scope="module", params=[None, 0.0], ids=["by default", "at once"])
def paced(
    request: pytest.FixtureRequest, loop: Loop, config: WeftConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, float]]:
    engine = EngineConfig() if request.param is None else EngineConfig(stream_interval_s=request.param)
    live = LiveServer(loop, replace(config, store=tmp_path_factory.mktemp("paced"), engine=engine))
    yield live, engine.stream_interval_s
    live.stop()


def test_messages_bring_tokens_together(paced: tuple[LiveServer, float]) -> None:
    live, interval_s = paced
    client = live.client
    wanted = client.tokens(None, 60)
    request = client.request(None, 60, options={"token_ids": True})
    counts, tokens = [], []
    for message in client.generation.StreamGenerate(request):
        counts.append(len(message.delta.token_ids))
        tokens += message.delta.token_ids
    assert tokens == wanted
    assert counts[0] == 1, "the first is worth a message of its own"
    if interval_s:
        assert len(counts) < 60, "steps of this model take some milliseconds"
        assert max(counts[1:]) > 1
    else:
        assert counts == [1] * 60
