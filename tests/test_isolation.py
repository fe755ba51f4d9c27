"""A request's answer does not depend on its neighbours.

Over a real channel: 64 concurrent greedy requests over the base and adapters of every method there is give exactly
the tokens that each gives alone (a token may differ only where the two best logits are closer than the base rounds).
At a fixed batch shape, bit for bit: a row's logits are the same whatever adapters its neighbours use.
"""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc.aio
import pytest
import torch

from tests import tiny
from tests.bases import Bases
from tests.neighbours import assert_same_bits
from tests.serving import Row, Step, selected
from weft.api.serve import build_model, serving
from weft.config import EngineConfig, ModelConfig, Quantization, ServerConfig, WeftConfig
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.catalog import METHODS
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2_grpc,
)

_TIE_LOGPROB = 0.05  # bfloat16 activations round logits of this base by about this much
_NUM_REQUESTS = 64


def _adapters(base: BaseShape) -> dict[str, Adapter]:
    loras = {f"lora-{rank}": tiny.random_lora(base, rank=rank, seed=rank) for rank in (1, 2, 4, 8, 16)}
    ia3s = {f"ia3-{seed}": tiny.random_ia3(base, seed=seed) for seed in range(4)}
    prefixes = {f"prefix-{n}": tiny.random_prefix(base, length=n, seed=n) for n in (3, 8, 16, 21)}
    prompts = {f"prompt-{n}": tiny.random_prompt(base, length=n, seed=n) for n in (3, 18)}
    others = {
        "ptuning-7": tiny.random_ptuning(base, length=7, seed=7),
        "lora-bias": tiny.random_lora(base, rank=3, seed=20, lora_bias=True),
        "lora-head": tiny.random_lora(base, rank=2, seed=21, targets=("lm_head", "q_proj")),
        "dora": tiny.random_dora(base, rank=4, seed=22),
        "dora-head": tiny.random_dora(base, rank=1, seed=23, targets=("lm_head",)),
        "bitfit": tiny.random_bitfit(base, seed=24),
        "vera": tiny.random_vera(base, rank=5, seed=29),
    }
    bottlenecks = {
        f"bottleneck-{form.value}": tiny.random_bottleneck(base, BottleneckConfig(form=form, size=3 + i), seed=25 + i)
        for i, form in enumerate(Form)
    }
    return {**loras, **ia3s, **prefixes, **prompts, **others, **bottlenecks}


class _Ask(NamedTuple):
    adapter_id: str
    prompt: tuple[int, ...]
    num_new: int


class _Answer(NamedTuple):
    tokens: tuple[int, ...]
    margins: tuple[float, ...]  # between the two best tokens


def _asks(adapter_ids: Sequence[str]) -> list[_Ask]:
    dice = random.Random(7)
    targets = ["", *adapter_ids]
    return [
        _Ask(
            targets[index % len(targets)],
            tuple(dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 70))),
            dice.randrange(8, 40),
        )
        for index in range(_NUM_REQUESTS)
    ]


async def _ask(stub: generation_service_pb2_grpc.GenerationServiceStub, ask: _Ask, salt: str) -> _Answer:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=ask.prompt),
        sampling=generation_pb2.Sampling(temperature=0),
        stopping=generation_pb2.Stopping(max_new_tokens=ask.num_new),
        options=generation_pb2.ResponseOptions(logprobs=2, token_ids=True),
        cache_salt=salt,
    )
    if ask.adapter_id:
        request.adapter_id = ask.adapter_id
    response = await stub.Generate(request)
    assert len(response.token_ids) == ask.num_new
    assert [a.adapter_id for a in response.finish.effective_adapters] == ([ask.adapter_id] if ask.adapter_id else [])
    margins = tuple(entry.top[0].logprob - entry.top[1].logprob for entry in response.logprobs)
    return _Answer(tuple(response.token_ids), margins)


def _differs(alone: _Answer, together: _Answer) -> bool:
    """Return whether two answers diverge at a token that was not a tie; after a tie they may differ."""
    for one, other, margin in zip(alone.tokens, together.tokens, alone.margins, strict=True):
        if one != other:
            return margin > _TIE_LOGPROB
    return False


@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.INT8])
async def test_concurrent_requests_answer_as_alone(quantization: Quantization, path: Path, tmp_path: Path) -> None:
    config = WeftConfig(
        model=ModelConfig(path=path, quantization=quantization, device="cpu"),
        store=tmp_path / "store",
        engine=EngineConfig(max_num_seqs=48, max_num_batched_tokens=160),  # chunks prompts, makes requests queue
        server=ServerConfig(port=0, metrics_port=0),
    )
    model, runner = build_model(config)
    adapters = _adapters(model.base.shape)
    assert {adapter.method.name for adapter in adapters.values()} == METHODS.keys()
    for adapter_id, adapter in adapters.items():
        directory.write(adapter, config.store / "src" / adapter_id, model.base.shape)
    async with (
        serving(config, model, runner, []) as served,
        grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel,
    ):
        register = adapter_service_pb2_grpc.AdapterServiceStub(channel).RegisterAdapter
        for adapter_id in adapters:
            await register(
                adapter_service_pb2.RegisterAdapterRequest(adapter_id=adapter_id, source=f"src/{adapter_id}")
            )
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        asks = _asks(list(adapters))
        alone = {ask: await _ask(stub, ask, "alone") for ask in asks}
        assert len({answer.tokens[:8] for answer in alone.values()}) > _NUM_REQUESTS // 2
        # Negative control: the comparison detects an answer of the wrong adapter.
        swapped = asks[1]._replace(adapter_id=asks[2].adapter_id)
        assert _differs(alone[asks[1]], await _ask(stub, swapped, "control"))
        for shuffle, salt in enumerate(("first", "second", "alone")):  # the last one may use the prefix cache
            order = list(asks)
            random.Random(shuffle).shuffle(order)
            together = await asyncio.gather(*(_ask(stub, ask, salt) for ask in order))
            wrong = [ask for ask, answer in zip(order, together, strict=True) if _differs(alone[ask], answer)]
            assert not wrong, f"shuffle {shuffle}: {len(wrong)} answers differ, first {wrong[0]}"
        blocks = served.application.engine.blocks
        assert blocks.num_used_blocks == sum(blocks.count(a.num_virtual_tokens) for a in adapters.values())
        unregister = adapter_service_pb2_grpc.AdapterServiceStub(channel).UnregisterAdapter
        for adapter_id in adapters:
            await unregister(adapter_service_pb2.UnregisterAdapterRequest(adapter_id=adapter_id))
        assert blocks.num_used_blocks == len(runner.slots) == 0


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_neighbours_adapters_leave_a_row_bit_equal(quantization: Quantization, num_tokens: int, bases: Bases) -> None:
    base = bases("llama", quantization)
    step = Step(base, selected(base))
    adapters = [None, *_adapters(base.shape).values()]
    dice = random.Random(1)
    prompts = [[dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(16)]
    for mine in (adapters[0], adapters[4], adapters[7], adapters[11], *adapters[14:]):
        drawn = [[dice.choice(adapters) for _ in prompts[1:]] for _ in range(8)]
        drawn[1] = [mine] * len(prompts[1:])  # all rows like mine: this changes the grouping by adapter most
        neighbourhoods = [list(map(Row, prompts[1:], neighbours)) for neighbours in drawn]
        assert_same_bits(step, Row(prompts[0], mine), neighbourhoods, Row(prompts[0], adapters[1]))


def test_an_outlier_threshold_would_break_the_promise(bases: Bases) -> None:
    """Negative control, and why int8 runs with threshold 0: LLM.int8's outlier columns are taken over all rows."""
    base = bases.fresh("llama", Quantization.INT8)
    step = Step(base, selected(base))
    rows = [Row([5]), Row([77])], [Row([5]), Row([101])]

    def first_logits_differ() -> bool:
        return not torch.equal(step.logits(rows[0])[0], step.logits(rows[1])[0])

    assert not first_logits_differ()
    for module in base.model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.state.threshold = 2.0
    assert first_logits_differ()
