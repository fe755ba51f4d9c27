"""Several adapters with virtual positions in one request, through the API: weights, sharing, freeing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import Sources
from tests.server.live import LiveServer
from tests.server.test_composition import LONG, TEXT, of

NAMES = ("prefix-7", "prompt-8", "lora-9")


@pytest.fixture(autouse=True)
def _registered(server: LiveServer, sources: Sources) -> Iterator[None]:
    for name in NAMES:
        server.client.register(name, sources(name))
    yield
    for name in NAMES:
        server.client.unregister(name, allow_missing=True)


def test_each_adds_to_the_answer_at_its_weight_and_weight_0_is_absence(server: LiveServer) -> None:
    client = server.client
    compositions = [
        of(prefix_7=1.0),
        of(prefix_7=0.25),
        of(prefix_7=1.0, prompt_8=1.0),
        of(prefix_7=4.0, prompt_8=0.0625),
        of(prefix_7=1.0, prompt_8=0.25, prefix_1=3.0),
        of(prefix_7=1.0, prompt_8=0.25, prefix_1=3.0, lora_9=-0.5),
    ]
    alone = [client.tokens(None, LONG, text=TEXT, **one) for one in compositions]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    with ThreadPoolExecutor(len(compositions)) as pool:
        beside = pool.map(lambda one: client.tokens(None, LONG, text=TEXT, cache_salt="beside", **one), compositions)
    assert list(beside) == alone
    assert alone[0] == client.tokens("prefix-7", LONG, text=TEXT)
    assert alone[2] == client.tokens(None, LONG, text=TEXT, **of(prefix_7=1.0, prefix_1=0.0, prompt_8=1.0))


def test_deltas_may_change_places_and_virtual_positions_may_not(server: LiveServer) -> None:
    def cached(**weights: float | None) -> int:
        asked = server.client.generate(None, 4, text=TEXT, cache_salt="places", **of(**weights))
        return asked.finish.usage.cached_prompt_tokens

    whole = len(TEXT) // 16 * 16
    assert cached(prefix_7=0.5, lora_9=2.0, prompt_8=1.0) == 0
    assert cached(lora_9=2.0, prefix_7=0.5, prompt_8=1.0) == whole
    assert cached(prefix_7=0.5, prompt_8=1.0, lora_9=2.0) == whole
    assert cached(prompt_8=1.0, prefix_7=0.5, lora_9=2.0) == 0, "in another order they stand elsewhere"
    assert cached(prefix_7=1.0, lora_9=2.0, prompt_8=0.5) == 0
    assert cached(prefix_7=0.5, lora_9=2.0) == 0


def test_blocks_of_all_of_them_come_back(server: LiveServer) -> None:
    blocks = server.application.engine.blocks
    answer = server.client.generate(None, 4, text=TEXT, **of(prefix_7=0.5, prompt_8=2.0))
    assert [part.adapter_id for part in answer.finish.effective_adapters] == ["prefix-7", "prompt-8"]
    used = blocks.num_used_blocks
    server.client.unregister("prompt-8")
    assert blocks.num_used_blocks == used - 1
    server.client.unregister("prefix-7")
    assert blocks.num_used_blocks == used - 2
