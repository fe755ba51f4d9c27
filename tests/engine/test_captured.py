"""Decode steps that are padded, copied into permanent buffers and computed from there equal plain steps."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine.decoding import Decoding
from tests.mixing.textbook_composition import Composition
from weft.adapters.slots import SlotTable
from weft.engine.capture import shapes
from weft.kernels.capture import NotCapturable, Replay
from weft.kernels.selection import select
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.protocol import Adapter, BaseShape
from weft.model import loader


class Capturer:
    """A substitute for CUDA graphs on machines without them: a replay calls the function again, into the same result.

    The kernels for CPUs and Triton's interpreter read tensors on the host, which never happens on a device.
    """

    needs_proof = False

    def __init__(self) -> None:
        self.num_captured = 0

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        self.num_captured += 1
        result = torch.empty_like(function())

        def replay() -> Tensor:
            return result.copy_(function())

        return replay


class Forgetful(Capturer):
    """A replay that returns the captured result, whatever the inputs are by now."""

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        result = function()
        return lambda: result


def _adapters(base: BaseShape) -> list[Adapter]:
    plain = [
        tiny.random_lora(base, rank=3, seed=1),
        tiny.random_lora(base, rank=2, seed=2, targets=("lm_head", "q_proj")),
        tiny.random_lora(base, rank=4, seed=3, lora_bias=True),
        tiny.random_ia3(base, seed=4),
        tiny.random_prefix(base, length=21, seed=5),
        tiny.random_prompt(base, length=3, seed=6),
        tiny.random_dora(base, rank=4, seed=7),
        tiny.random_bitfit(base, seed=8),
    ]
    forms = [tiny.random_bottleneck(base, BottleneckConfig(form=f, size=3), seed=9 + i) for i, f in enumerate(Form)]
    return plain + forms


def mixed(base: BaseShape, count: int, seed: int) -> list[Composition]:
    """Draw the parts of `count` requests: none, one, or several of any method, and prefixes with a gate."""
    dice, adapters = random.Random(seed), _adapters(base)
    requests = [[], *([(adapter, 1.0)] for adapter in adapters), [(adapters[4], 0.5), (adapters[5], 1.0)]]
    while len(requests) < count:
        chosen = dice.sample(range(len(adapters)), dice.randrange(1, 4))
        requests.append([(adapters[index], dice.choice([0.25, 1.0])) for index in chosen])
    dice.shuffle(requests)
    return requests[:count]


def _decodings(base: loader.Base, capture: Capturer) -> tuple[Decoding, Decoding]:
    kernels = select(base.device, base.dtype)
    assert kernels.driver is not None, "the reference driver reads more than tensors"
    captured = replace(kernels, capture=lambda: capture, captures_ahead=True)
    return Decoding(base, kernels), Decoding(base, captured, num_captured_rows=32)


@pytest.mark.parametrize("count", [1, 3, 13, 21])
def test_captured_steps_give_the_logits_of_plain_ones(base: loader.Base, count: int) -> None:
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    requests = mixed(base.shape, count, seed=count)
    for decoding in (plain, captured):
        decoding.start(requests)
    for step in range(20):  # over the edge of a block
        wanted, got = plain.step(), captured.step()
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=f"step {step}")
    assert capture.num_captured == 1


def test_a_replay_that_forgets_its_inputs_is_noticed(base: loader.Base) -> None:
    """Negative control."""
    plain, forgetful = _decodings(base, Forgetful())
    for decoding in (plain, forgetful):
        decoding.start(mixed(base.shape, 5, seed=1))
    torch.testing.assert_close(forgetful.step(), plain.step(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(forgetful.step(), plain.step(), rtol=1e-2, atol=1e-2)


def test_requests_that_come_and_go_share_the_captures_of_their_sizes(base: loader.Base) -> None:
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    requests = [[(tiny.random_lora(base.shape, rank=2, seed=seed), 1.0)] for seed in range(7)]
    for decoding in (plain, captured):
        decoding.start(requests)
    for kept in (range(7), range(5), [4, 2, 0], [0, 2, 4], range(6), [3], range(7)):
        torch.testing.assert_close(captured.step(list(kept)), plain.step(list(kept)), rtol=1e-4, atol=1e-5)
    assert capture.num_captured == 3, "of 8, 4 and 1 rows"


def test_adapters_that_change_what_is_launched_make_a_new_recording(base: loader.Base) -> None:
    """A change of only the contents of slots does not."""
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    for made, adapter in enumerate(
        [
            tiny.random_lora(base.shape, rank=4, seed=1, targets=("q_proj",)),
            tiny.random_lora(base.shape, rank=4, seed=2),
            tiny.random_ia3(base.shape, seed=3),
            tiny.random_bottleneck(base.shape, BottleneckConfig(form=Form.SUM, size=3), seed=4),
            tiny.random_lora(base.shape, rank=4, seed=5, targets=("lm_head",)),
        ]
    ):
        for other in (adapter, tiny.random_lora(base.shape, rank=4, seed=6, targets=("q_proj",))):
            for decoding in (plain, captured):
                decoding.start([[(other, 1.0)], []])
            torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
            for decoding in (plain, captured):
                decoding.end()
        assert capture.num_captured == 1 + made, "one for each capture key; that of q_proj alone comes again"


def test_a_table_that_has_moved_makes_captures_worthless(base: loader.Base) -> None:
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    loras = [tiny.random_lora(base.shape, rank=2, seed=seed) for seed in range(20)]
    for number in (2, 20, 20):  # more slots than the table has at first
        for decoding in (plain, captured):
            decoding.start([[(lora, 1.0)] for lora in loras[:number]])
        torch.testing.assert_close(captured.step([0, 1]), plain.step([0, 1]), rtol=1e-4, atol=1e-5)
        for decoding in (plain, captured):
            decoding.end()
    assert capture.num_captured == 2
    graphs = captured.runner._captured
    assert graphs is not None
    assert len(graphs.shapes) == 1, "the one that was captured with the small table is gone"


def test_steps_with_prompts_or_more_rows_than_are_captured_stay_plain(base: loader.Base) -> None:
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    for decoding in (plain, captured):
        decoding.start([[] for _ in range(33)])  # the prompts are a step
        decoding.step()
    assert capture.num_captured == 0
    torch.testing.assert_close(captured.step(range(32)), plain.step(range(32)), rtol=1e-4, atol=1e-5)
    assert capture.num_captured == 1


def test_steps_that_cannot_be_captured_run_as_others_do(base: loader.Base, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Capturer):
        def __call__(self, function: Callable[[], Tensor]) -> Replay:
            super().__call__(function)
            raise NotCapturable("operation not permitted")

    capture = Broken()
    plain, uncaptured = _decodings(base, capture)
    for decoding in (plain, uncaptured):
        decoding.start(mixed(base.shape, 5, seed=3))
    for _ in range(2):
        assert uncaptured.step().equal(plain.step())
    assert capture.num_captured == 1, "it is not tried again"
    assert "cannot be captured" in caplog.text
    uncaptured.runner.warm_up()
    assert capture.num_captured == 1


def test_what_is_captured_ahead_is_not_captured_again(base: loader.Base) -> None:
    capture = Capturer()
    plain, captured = _decodings(base, capture)
    captured.runner.warm_up()
    ahead = capture.num_captured
    assert ahead == 2 * len(shapes.step_sizes(32))
    for count in (1, 6, 30):
        for decoding in (plain, captured):
            decoding.start([[] for _ in range(count)])
        torch.testing.assert_close(captured.step(), plain.step(), rtol=1e-4, atol=1e-5)
        for decoding in (plain, captured):
            decoding.end()
    assert capture.num_captured == ahead


# -- padding -----------------------------------------------------------------------------------------------------------


def test_the_sizes_of_steps() -> None:
    assert shapes.step_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    assert all(shapes.step_size(n) >= n for n in range(1, 600))
    assert all(shapes.step_size(n) < 2 * n for n in range(1, 600))


def test_padding_touches_no_block_of_a_request(base: loader.Base) -> None:
    """Three padding rows write three scratch places; everything else is the same as after a plain step."""
    plain, captured = _decodings(base, Capturer())
    num_blocks = len(plain.pool_keys()[0])
    for mine in captured.pool_keys():
        mine[num_blocks:] = 7.0
    for decoding in (plain, captured):
        decoding.start([[] for _ in range(5)])
        decoding.step()
    for mine, theirs in zip(captured.pool_keys(), plain.pool_keys(), strict=True):
        torch.testing.assert_close(mine[:num_blocks], theirs, rtol=1e-4, atol=1e-5)
        written = (mine[num_blocks:].flatten(0, 1) != 7.0).flatten(1).all(-1)
        assert written.tolist() == [True] * 3 + [False] * (len(written) - 3)


# -- capture keys ------------------------------------------------------------------------------------------------------


def _decisions(slots: SlotTable) -> tuple[Sequence[object], ...]:
    """Return the facts that drivers branch on."""
    does_anything = [n > 0 for n in slots.num_entries]
    adds, scales = (reduce(or_, of.values(), 0) for of in (slots.outputs_at, slots.inputs_at))
    return does_anything, [adds, scales], [slots.num_residual_readers > 0]


def test_equal_keys_mean_equal_decisions(base: loader.Base) -> None:
    decoding = Decoding(base, select(base.device, base.dtype))
    dice, adapters = random.Random(0), _adapters(base.shape)
    seen: dict[object, tuple[Sequence[object], ...]] = {}
    for _ in range(60):
        decoding.start([[(adapter, 1.0)] for adapter in dice.sample(adapters, dice.randrange(1, 4))])
        slots = decoding.runner.slots
        kinds = slots.capture_key._replace(table_at=0, rank=0)
        assert seen.setdefault(kinds, _decisions(slots)) == _decisions(slots)
        decoding.end()
        assert not any(decoding.runner.slots.capture_key.kinds)
        assert decoding.runner.slots.capture_key.rank == 0
    assert len(seen) > 10
    assert len(set(map(str, seen.values()))) > 5


def test_the_capture_key_bounds_ranks_and_has_the_tables_place(base: loader.Base) -> None:
    decoding = Decoding(base, select(base.device, base.dtype))
    decoding.start([[(tiny.random_lora(base.shape, rank=rank, seed=rank), 1.0)] for rank in (3, 19, 2)])
    assert decoding.runner.slots.capture_key.rank == 32
    assert decoding.runner.slots.capture_key.table_at == decoding.runner.slots.device_table.data_ptr()
