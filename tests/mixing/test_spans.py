"""Several spans of virtual positions, each at its weight: the softmax over all keys together, with log-weights.

attention = softmax([s(K_1) + log w_1, …, s(K_S) + log w_S, s(K_real)]) [V_1; …; V_S; V_real]
"""

import math
import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.neighbours import assert_same_bits
from tests.serving import Row, Step, error, selected
from weft.kernels.cpu.attention import Attend
from weft.kernels.selection import REFERENCE, select
from weft.kernels.step import Paging
from weft.methods.protocol import Adapter, BaseShape
from weft.model.loader import Base
from weft.model.paged_attention import KVCache, ReferenceAttend

_HEADS, _KV_HEADS, _SIZE, _BLOCK = 4, 2, 8, 4
_SCALE = 0.4


class Layer:
    """One layer's cache with requests of (spans, real tokens), of whose tokens the last `num_queries` are computed."""

    def __init__(self, requests: Sequence[tuple[Sequence[int], int, int]], *, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        lengths = [[*spans, num_real] for spans, num_real, _ in requests]
        counts = [[-(-length // _BLOCK) for length in of_request] for of_request in lengths]
        free = iter(torch.randperm(sum(map(sum, counts)) + 2).tolist())
        blocks = [[[next(free) for _ in range(count)] for count in of_request] for of_request in counts]
        self.cache = KVCache.allocate(
            BaseShape(
                sites={}, num_layers=1, num_kv_heads=_KV_HEADS, head_dim=_SIZE, embedding_size=0, digest="", name=""
            ),
            num_blocks=sum(map(sum, counts)) + 2,
            block_size=_BLOCK,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.slots = [
            [self.cache.slots(of_span, length) for of_span, length in zip(own, of_request, strict=True)]
            for own, of_request in zip(blocks, lengths, strict=True)
        ]
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
            written = torch.zeros(tensor.flatten(0, 1).shape[:1], dtype=torch.bool)
            written[torch.cat([slots for own in self.slots for slots in own])] = True
            tensor.flatten(0, 1)[~written] = torch.nan  # holes, and free blocks
        tables = [list(chain.from_iterable(own)) for own in blocks]
        width, most = max(map(len, tables)), max(len(spans) for spans, _, _ in requests)
        self.paging = Paging(
            kv_slots=torch.cat([own[-1][-count:] for own, (_, _, count) in zip(self.slots, requests, strict=True)]),
            query_start=torch.tensor([0, *(count for _, _, count in requests)]).cumsum(0).int(),
            context_lens=torch.tensor([num_real for _, num_real, _ in requests], dtype=torch.int32),
            virtual_lens=torch.tensor([[*spans, *[0] * (most - len(spans))] for spans, _, _ in requests]).int(),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables]).int(),
        )
        num_rows = len(self.paging.kv_slots)
        self.query = torch.randn(num_rows, _HEADS, _SIZE, dtype=dtype)
        self.key, self.value = torch.randn(2, num_rows, _KV_HEADS, _SIZE, dtype=dtype)

    def attend(self, attend: Any, log_gates: Tensor | None, *, window: int = 0, softcap: float = 0.0) -> Tensor:
        paging = self.paging._replace(log_gates=log_gates)
        return attend(paging, 0, self.query, self.key, self.value, _SCALE, window, softcap)

    def by_hand(self, log_gates: Tensor, *, window: int = 0, softcap: float = 0.0) -> Tensor:
        """Row by row and head by head, over the list of keys that the row sees; `attend` has stored the step's."""
        keys, values = (pool[0].flatten(0, 1).double() for pool in (self.cache.keys, self.cache.values))
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        starts = self.paging.query_start.tolist()
        for b, own in enumerate(self.slots):
            num_virtual, num_real = sum(map(len, own[:-1])), len(own[-1])
            for row in range(starts[b], starts[b + 1]):
                position = num_virtual + num_real - starts[b + 1] + row
                at, seen = 0, []
                for span, slots in enumerate(own):
                    gate = 0.0 if span == len(own) - 1 else log_gates[row, span].item()
                    for slot in slots.tolist():
                        if at <= position and (not window or position - at < window) and gate != -math.inf:
                            seen.append((slot, gate))
                        at += 1
                for head in range(_HEADS):
                    scores = []
                    for slot, gate in seen:
                        score = _SCALE * float(self.query[row, head].double() @ keys[slot, head // 2])
                        scores.append((softcap * math.tanh(score / softcap) if softcap else score) + gate)
                    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                    out[row, head] = weights @ torch.stack([values[slot, head // 2] for slot, _ in seen])
        return out


_REQUESTS = [([3, 5], 6, 6), ([], 9, 4), ([8], 5, 1), ([1, 9, 4], 3, 3), ([], 1, 1)]


def _gates(layer: Layer) -> Tensor:
    gates = torch.randn(len(layer.query), layer.paging.virtual_lens.shape[1])
    gates[1::4, 0] = gates[2::3, 1] = -torch.inf
    return gates


def _reference(layer: Layer) -> ReferenceAttend:
    return ReferenceAttend(layer.cache.keys, layer.cache.values)


def _kernel(layer: Layer) -> Attend:
    assert select(torch.device("cpu"), torch.float32) is not REFERENCE
    return Attend(layer.cache.keys, layer.cache.values)


@pytest.mark.parametrize("window", [0, 2, 9])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_reference_and_the_kernel_are_the_formula(window: int, softcap: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        layer = Layer(_REQUESTS, dtype=dtype)
        gates, options = _gates(layer), {"window": window, "softcap": softcap}
        got = [layer.attend(_reference(layer), gates, **options)]
        if dtype is torch.float32:
            got.append(layer.attend(_kernel(layer), gates, **options))
        wanted = layer.by_hand(gates, **options)
        for out in got:
            torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)
        # Negative control: without the gates the result differs.
        assert (wanted - layer.by_hand(torch.zeros_like(gates), **options)).abs().max() > 0.05


def test_spans_without_gates_are_the_formula_at_weight_one() -> None:
    layer = Layer(_REQUESTS, dtype=torch.float32)
    zeros = torch.zeros(len(layer.query), 3)
    for attend in (_reference(layer), _kernel(layer)):
        without, with_zeros = layer.attend(attend, None), layer.attend(attend, zeros)
        assert without.equal(with_zeros)
        torch.testing.assert_close(without.double(), layer.by_hand(zeros), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_what_a_row_does_not_see_may_hold_nan(kernels: str) -> None:
    layer = Layer(_REQUESTS, dtype=torch.float32)
    attend = _reference(layer) if kernels == "reference" else _kernel(layer)
    gates = torch.zeros(len(layer.query), 3)
    closed = torch.zeros(len(layer.query), dtype=torch.bool)
    closed[:6:2] = True  # of the first request's rows
    gates[closed, 1] = -torch.inf
    before = layer.attend(attend, gates)
    for pool in (layer.cache.keys, layer.cache.values):
        pool[0].flatten(0, 1)[layer.slots[0][1]] = torch.nan
    after = layer.attend(attend, gates)
    assert after[closed].equal(before[closed])
    assert after[6:].equal(before[6:])
    assert after[:6][~closed[:6]].isnan().all(), "negative control: the others see it"


def test_a_layer_reads_the_gates_that_stand_there_when_it_begins() -> None:
    """The packed paging is made once a step; a mixture writes into the same tensor before each layer."""
    layer = Layer(_REQUESTS, dtype=torch.float32)
    attend, gates = _kernel(layer), _gates(layer)
    paging = layer.paging._replace(log_gates=gates)
    for _ in range(3):
        out = attend(paging, 0, layer.query, layer.key, layer.value, _SCALE, 0, 0.0)
        torch.testing.assert_close(out.double(), layer.by_hand(gates), rtol=0, atol=2e-6)
        gates.copy_(_gates(layer))


# -- through a model -------------------------------------------------------------------------------------------------


def _virtuals(base: Base) -> list[Adapter]:
    return [
        tiny.random_prefix(base.shape, length=5, seed=1),
        tiny.random_prefix(base.shape, length=18, seed=2),
        tiny.random_prompt(base.shape, length=7, seed=3),
    ]


_TOKENS = list(range(40, 63))


@pytest.mark.parametrize("weights", [(1.0, 0.25, 1.0), (0.25, 2.5, 0.125)])
def test_two_prefixes_and_a_prompt_are_the_formula(
    weights: tuple[float, ...], base: Base, exact: Base, stock: Any
) -> None:
    parts = list(zip(_virtuals(base), weights, strict=True))
    lora = tiny.random_lora(base.shape, rank=4, seed=4)
    for composition in (parts, parts[::-1], [(lora, -0.5), *parts]):
        wanted = textbook.logits(stock, _TOKENS, composition)
        for kernels in (REFERENCE, selected(base)):
            (got,) = Step(base, kernels).logits([Row(_TOKENS, adapters=composition)])
            assert error(got, wanted) < 2e-5
    moved = [(adapter, weight * 1.01) for adapter, weight in parts]
    assert error(textbook.logits(stock, _TOKENS, parts), textbook.logits(stock, _TOKENS, moved)) > 1e-4, "control"
    (got,) = Step(exact, REFERENCE).logits([Row(_TOKENS, adapters=parts)])
    assert error(got, textbook.logits(stock, _TOKENS, parts)) < 1e-6


def test_a_weight_of_one_has_the_bits_of_the_adapter_alone(base: Base) -> None:
    """Also beside a neighbour whose weights require log-gates for the whole step."""
    step, (short, long, prompt) = Step(base, selected(base)), _virtuals(base)
    plain = step.logits([Row(_TOKENS, long), Row(_TOKENS, prompt), Row(_TOKENS)])
    beside = step.logits(
        [Row(_TOKENS, adapters=[(long, 1.0)]), Row(_TOKENS, prompt), Row(_TOKENS, adapters=[(short, 0.5), (long, 2)])]
    )
    assert beside[0].equal(plain[0])
    assert beside[1].equal(plain[1])
    assert not beside[2].equal(plain[2])
    less = step.logits([Row(_TOKENS, adapters=[(long, 0.99)]), Row(_TOKENS, prompt), Row(_TOKENS)])
    assert not less[0].equal(plain[0]), "negative control"


def test_neighbours_spans_and_weights_leave_a_row_bit_equal(base: Base) -> None:
    step, virtuals, dice = Step(base, selected(base)), _virtuals(base), random.Random(5)

    def drawn() -> list[tuple[Adapter, float]]:
        chosen = dice.sample(virtuals, dice.randrange(4))
        return [(adapter, dice.choice([1.0, 0.5, 3.0])) for adapter in chosen]

    for mine in ([], [(virtuals[0], 1.0)], [(virtuals[1], 0.5), (virtuals[2], 1.0), (virtuals[0], 2.0)]):
        neighbourhoods = [[Row(_TOKENS, adapters=drawn()) for _ in range(5)] for _ in range(4)]
        changed = [(adapter, weight * 1.5) for adapter, weight in mine] or [(virtuals[0], 1.0)]
        assert_same_bits(step, Row(_TOKENS, adapters=mine), neighbourhoods, Row(_TOKENS, adapters=changed))


def test_the_smaller_its_weight_the_nearer_to_no_adapter(llama: Base) -> None:
    """With relative positions: a prefix of weight 0 still takes positions before the tokens."""
    step, long = Step(llama, selected(llama)), _virtuals(llama)[1]
    (without,) = step.logits([Row(_TOKENS)])
    errors = [
        error(step.logits([Row(_TOKENS, adapters=[(long, weight)])])[0], without) for weight in (1.0, 0.1, 1e-3, 1e-7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-4
