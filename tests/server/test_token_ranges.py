"""Activated adapters and token ranges through the API: answers, shared blocks, refusals.

In float32, so that answers can be compared token for token whatever was cached, and in chunks of a few tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.server.conftest import Sources
from tests.server.live import LiveServer, Loop, refused
from weft.config import EngineConfig, Quantization, WeftConfig
from weft.v1 import generation_pb2

BLOCK = 16
LONG = 24
CONTEXT = "A long document that everybody asks about, one question after the other, each with an adapter of its own. "
GO, STOP = "<go>", "<stop>"


def ids(text: str) -> list[int]:
    """The tiny base has one token per ASCII character."""
    return [ord(character) for character in text]


def part(adapter_id: str, *ranges: tuple[int, int] | tuple[int], weight: float = 1.0) -> generation_pb2.WeightedAdapter:
    """Return a part that acts in these ranges; one number is a beginning without an end."""
    return generation_pb2.WeightedAdapter(
        adapter_id=adapter_id,
        weight=weight,
        token_ranges=[
            generation_pb2.TokenRange(begin=one[0], end=one[1])
            if len(one) == 2
            else generation_pb2.TokenRange(begin=one[0])
            for one in ranges
        ],
    )


def of(*parts: generation_pb2.WeightedAdapter) -> dict[str, Any]:
    return {"composition": generation_pb2.Composition(adapters=parts)}


@pytest.fixture(scope="module")
def server(loop: Loop, config: WeftConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Holds lora-1, ia3-1 and prefix-1."""
    exact = replace(
        config,
        model=replace(config.model, quantization=Quantization.NONE, dtype="float32"),
        store=tmp_path_factory.mktemp("exact"),
        engine=EngineConfig(max_num_seqs=8, max_num_batched_tokens=24, num_kv_blocks=512, max_model_len=256),
    )
    live = LiveServer(loop, exact)
    for name in ("lora-1", "ia3-1", "prefix-1"):
        live.client.register(name, _sources(live)(name))
    yield live
    live.stop()


def _sources(live: LiveServer) -> Sources:
    """Return sources for this base, which differs from that of the other tests."""
    return Sources(live.config.allowed_sources[0] / "exact", live.model.base.shape)


Register = Callable[[str, str, Sequence[int] | None], None]


@pytest.fixture
def register(server: LiveServer) -> Iterator[Register]:
    """Yield a function that registers a source with these invocation tokens, until the test ends."""
    registered: list[str] = []

    def register(adapter_id: str, name: str, invocation: Sequence[int] | None) -> None:
        sources = _sources(server)
        parts = sources.parts(name)
        config = {**parts.config, "alora_invocation_tokens": None if invocation is None else list(invocation)}
        path = sources.root / f"activated-{adapter_id}"
        server.client.register(adapter_id, parts._replace(config=config).files().write(path))
        registered.append(adapter_id)

    yield register
    for adapter_id in registered:
        server.client.unregister(adapter_id, allow_missing=True)


def _cached(answer: Any) -> int:
    return answer.finish.usage.cached_prompt_tokens


def test_blocks_before_the_invocation_are_the_base_s(server: LiveServer, register: Register) -> None:
    """The base fills them, one activated adapter after another uses them, and each answers as without a cache."""
    client = server.client
    register("go", "lora-1", ids(GO))
    register("stop", "lora-5", ids(STOP))
    text, shared = CONTEXT + GO + " and answer.", len(CONTEXT) // BLOCK * BLOCK
    assert shared >= 4 * BLOCK
    cold = {name: client.generate(name, LONG, text=text, cache_salt=f"cold-{name}") for name in ("go", "stop")}
    assert [_cached(answer) for answer in cold.values()] == [0, 0]
    assert _cached(client.generate(None, LONG, text=CONTEXT + "?", cache_salt="warm")) == 0
    go = client.generate("go", LONG, text=text, cache_salt="warm")
    assert _cached(go) == shared
    assert go.tokens == cold["go"].tokens
    other = CONTEXT + STOP + " and answer."
    stop = client.generate("stop", LONG, text=other, cache_salt="warm")
    assert _cached(stop) == shared
    assert stop.tokens == client.tokens("stop", LONG, text=other, cache_salt="cold-again")
    again = client.generate("go", LONG, text=text, cache_salt="warm")
    assert _cached(again) == len(text) // BLOCK * BLOCK, "its own blocks behind the invocation"
    assert again.tokens == go.tokens
    # Negative controls: the adapter has an effect, and its blocks are not taken for the base's.
    base = client.generate(None, LONG, text=text, cache_salt="warm")
    assert base.tokens != go.tokens
    assert _cached(base) == shared
    register("always", "lora-1", None)
    always = client.generate("always", LONG, text=text, cache_salt="warm")
    assert _cached(always) == 0
    assert always.tokens != go.tokens


def test_the_base_takes_what_an_activated_adapter_computed(server: LiveServer, register: Register) -> None:
    """The other way round, and across an eviction of the adapter: the blocks before it are not its own."""
    client = server.client
    register("go", "lora-1", ids(GO))
    text, shared = CONTEXT + GO + " and answer.", len(CONTEXT) // BLOCK * BLOCK
    assert _cached(client.generate("go", 4, text=text, cache_salt="first")) == 0
    own = (len(text) + 4 - 1) // BLOCK - shared // BLOCK
    assert client.unregister("go").freed_kv_blocks == own > 0
    base = client.generate(None, LONG, text=text, cache_salt="first")
    assert _cached(base) == shared
    assert base.tokens == client.tokens(None, LONG, text=text, cache_salt="cold")


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        (GO + CONTEXT, 0),
        (CONTEXT + GO, len(CONTEXT)),
        (GO + CONTEXT + GO + CONTEXT, len(GO + CONTEXT)),
        ("aa<go<go>", 5),
    ],
)
def test_the_last_invocation_in_the_prompt_counts(
    text: str, begin: int, server: LiveServer, register: Register
) -> None:
    """It is its own weights with a token range."""
    client = server.client
    register("go", "lora-1", ids(GO))
    answer = client.generate("go", LONG, text=text)
    assert answer.tokens == client.tokens(None, LONG, text=text, **of(part("lora-1", (begin,))))
    assert answer.tokens != client.tokens(None, LONG, text=text, cache_salt="base"), "negative control"
    assert [(a.adapter_id, a.weight) for a in answer.finish.effective_adapters] == [("go", 1.0)]


def test_without_an_invocation_the_base_answers_and_says_so(server: LiveServer, register: Register) -> None:
    client = server.client
    register("go", "lora-1", ids(GO))
    options = generation_pb2.ResponseOptions(token_ids=True, gates=True)
    answer = client.generate("go", LONG, options=options, text=CONTEXT + "<g o>")
    assert answer.tokens == client.tokens(None, LONG, text=CONTEXT + "<g o>")
    assert [(a.adapter_id, a.weight) for a in answer.finish.effective_adapters] == [("go", 0.0)]
    assert [(gate.adapter_id, gate.mean) for gate in answer.finish.gates] == [("go", 0.0)]
    # Beside another part, the other part alone acts.
    text = CONTEXT + "?"
    both = client.generate(None, LONG, text=text, **of(part("go"), part("ia3-1", weight=0.5)))
    assert both.tokens == client.tokens(None, LONG, text=text, **of(part("ia3-1", weight=0.5)))
    assert [(a.adapter_id, a.weight) for a in both.finish.effective_adapters] == [("go", 0.0), ("ia3-1", 0.5)]


def test_requests_of_every_kind_at_once_answer_as_alone(server: LiveServer, register: Register) -> None:
    """Base, plain, activated and ranged requests, in one batch and over one cache."""
    client = server.client
    register("go", "lora-1", ids(GO))
    register("stop", "lora-5", ids(STOP))
    register("always", "lora-5", None)
    kinds: list[tuple[str | None, dict[str, Any]]] = [
        (None, {}),
        ("go", {}),
        ("stop", {}),
        ("always", {}),
        ("prefix-1", {}),
        (None, of(part("lora-1", (40,)), part("ia3-1", (0, 30), weight=-0.5), part("prefix-1"))),
        (None, of(part("go"), part("stop", weight=0.5), part("ia3-1", (9, 99)))),
    ]
    texts = [CONTEXT[:count] + GO + CONTEXT[:count] + STOP + "!" for count in (3, 30, 60)] + [CONTEXT + GO + GO]
    asked = [(name, {"text": text, **fields}) for text in texts for name, fields in kinds]
    alone = [client.tokens(n, LONG, cache_salt=f"alone-{i}", **fields) for i, (n, fields) in enumerate(asked)]
    with ThreadPoolExecutor(8) as pool:
        for salt in ("at once", "at once", "and backwards"):
            order = sorted(range(len(asked)), reverse=salt != "at once")
            calls = {i: pool.submit(client.generate, asked[i][0], LONG, cache_salt=salt, **asked[i][1]) for i in order}
            answers = {i: call.result() for i, call in calls.items()}
            assert [answers[i].tokens for i in range(len(asked))] == alone
    assert sum(_cached(answer) for answer in answers.values()) > 0
    for start in range(0, len(asked), len(kinds)):
        of_text = [tuple(tokens) for tokens in alone[start : start + len(kinds)]]
        assert len(set(of_text)) >= len(kinds) - 1, (
            "negative control: the kinds differ, but that one text stops nothing"
        )


def test_an_adapter_tells_its_invocation(server: LiveServer, register: Register) -> None:
    register("go", "lora-1", ids(GO))
    assert list(server.client.get("go").invocation_tokens) == ids(GO)
    assert not server.client.get("lora-1").invocation_tokens


# -- token ranges -----------------------------------------------------------------------------------------------------


def test_ranges_that_hold_every_token_are_none(server: LiveServer) -> None:
    client, whole = server.client, server.client.tokens("lora-1", LONG, text=CONTEXT)
    for same in (part("lora-1", (0,)), part("lora-1", (0, 7), (7,)), part("lora-1", (0, 9000))):
        assert client.tokens(None, LONG, text=CONTEXT, **of(same)) == whole
    hit = client.generate(None, LONG, text=CONTEXT, **of(part("lora-1", (0, 7), (7,))))
    assert _cached(hit) == len(CONTEXT) // BLOCK * BLOCK, "they have the same key"
    base = client.tokens(None, LONG, text=CONTEXT)
    assert client.tokens(None, LONG, text=CONTEXT, **of(part("lora-1", (9000,)))) == base
    for other in (part("lora-1", (1,)), part("lora-1", (0, 7)), part("lora-1", (0, 7), (8,))):
        assert client.tokens(None, LONG, text=CONTEXT, **of(other)) not in (whole, base), "negative control"


def test_adapters_of_disjoint_ranges_share_up_to_where_they_part(server: LiveServer) -> None:
    client = server.client

    def ask(*parts: generation_pb2.WeightedAdapter) -> Any:
        return client.generate(None, 4, text=CONTEXT, cache_salt="disjoint", **of(*parts))

    first = part("lora-1", (0, 20))
    assert _cached(ask(first, part("ia3-1", (40,)))) == 0
    assert _cached(ask(first, part("ia3-1", (64,)))) == 32
    assert _cached(ask(part("ia3-1", (64,)), first)) == len(CONTEXT) // BLOCK * BLOCK
    assert _cached(ask(first)) == 64
    assert _cached(ask(part("lora-1", (0, 21)))) == 16
    assert _cached(ask(part("ia3-1", (64,)))) == 0


def test_the_mean_gate_counts_the_tokens_that_were_computed(server: LiveServer) -> None:
    options = generation_pb2.ResponseOptions(token_ids=True, gates=True)

    def means(text: str, *parts: generation_pb2.WeightedAdapter) -> list[float]:
        finish = server.client.generate(None, 5, options=options, text=text, cache_salt="means", **of(*parts)).finish
        return [gate.mean for gate in finish.gates]

    wanted = pytest.approx([0.5 * 4 / 24, 2.0 * 14 / 24])
    assert means("a" * 20, part("lora-1", (3, 7), weight=0.5), part("ia3-1", (10,), weight=2.0)) == wanted
    # The first block is not computed again: 8 tokens are, all of them after the first range.
    again = pytest.approx([0.0, 2.0])
    assert means("a" * 20, part("lora-1", (3, 7), weight=0.5), part("ia3-1", (10,), weight=2.0)) == again


@pytest.mark.parametrize(
    ("ranges", "field"),
    [
        ([(3, 3)], "[0]"),
        ([(4, 3)], "[0]"),
        ([(0, 0)], "[0]"),
        ([(0, 5), (4, 6)], "[1]"),
        ([(5, 6), (0, 5)], "[1]"),
        ([(0,), (7, 9)], "[1]"),
        ([(2**31 - 1,)], "[0]"),
        ([(0, 2**31)], "[0]"),
        ([(2 * k, 2 * k + 1) for k in range(17)], ""),
    ],
)
def test_row_85_ranges_out_of_order(ranges: list[tuple], field: str, server: LiveServer) -> None:
    asked = of(part("ia3-1"), part("lora-1", *ranges))
    failure = refused(lambda: server.client.generate(None, **asked), "INVALID_ARGUMENT", "COMPOSITION_INVALID")
    assert failure.metadata["field"] == f"composition.adapters[1].token_ranges{field}"
    if field:  # too many are refused before they are looked at
        assert failure.metadata["index"] == "1"


def test_row_85_virtual_tokens_have_no_ranges(server: LiveServer) -> None:
    asked = of(part("prefix-1", (0, 5)))
    failure = refused(lambda: server.client.generate(None, **asked), "INVALID_ARGUMENT", "COMPOSITION_INVALID")
    assert failure.metadata["field"] == "composition.adapters[0].token_ranges"
    server.client.generate(None, **of(part("prefix-1")))
