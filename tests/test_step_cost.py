"""The cost of a step in calls, not in seconds: it does not grow with the number of adapters, rows or tokens.

Counted around one model call (tests/calls.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests import tiny
from tests.bases import Bases
from tests.calls import counted
from tests.mixing.compositions import MAKERS, VIRTUAL
from tests.mixing.mixtures import made
from tests.serving import Row, Step
from weft.adapters import packed_adapter
from weft.config import Quantization
from weft.engine.runner import ModelRunner
from weft.engine.token_ranges import TokenRange
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.protocol import Adapter
from weft.model import loader
from weft.model.packed import multiplies_bfloat16

pytestmark = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="what is counted is the form that serves where bfloat16 is multiplied"
)

_Calls = Counter[str]
DELTAS = tuple(name for name in MAKERS if name not in VIRTUAL)


@pytest.fixture(scope="module")
def base(bases: Bases) -> loader.Base:
    return bases.served("llama", Quantization.NF4)


class _CountingRunner(ModelRunner):
    """Counts the calls of one forward."""

    calls: _Calls

    def forward(self, batch: Any) -> torch.Tensor:
        logits, self.calls = counted(lambda: ModelRunner.forward(self, batch))
        return logits


def _step(base: loader.Base, kernels: Kernels) -> Step:
    step = Step(base, kernels)
    step.runner.__class__ = _CountingRunner
    # Before counting: bitsandbytes packs its weights once, and the slot tables reach their size and are wrapped once.
    loras = [tiny.random_lora(base.shape, rank=2, seed=seed) for seed in range(64)]
    step.logits(
        [Row([1], one) for one in [*loras, tiny.random_lora(base.shape, rank=2, seed=64, targets=("lm_head",))]]
    )
    return step


def _calls(step: Step, adapters: list[Adapter | None], *, num_tokens: int = 1) -> _Calls:
    step.logits([Row([5] * num_tokens, adapter) for adapter in adapters])
    return step.runner.calls  # pyright: ignore[reportAttributeAccessIssue]  # set by _step


# Calls of kernels and products in a step of the tiny Llama, whatever its rows have. A change here changes the speed.
PER_LAYER = {
    "deltas.py:post": 7,
    "deltas.py:pre": 0,
    "attention.py:store": 1,
    "attention.py:attend": 1,
    "elementwise.py:gate": 1,
    "modules.py:Linear4bit.forward": 4,
}
ONCE = {
    "elementwise.py:rms_norm": 2 * 2 + 1,
    "inject.py:LinearGroup.outputs": 2 * 2,
    "packed.py:PackedLinear.forward": 1,
}

COPIES_MAX = 13
ALLOCATED_BYTES_MAX = 416_032  # by torch, for 64 rows


def launched(calls: _Calls) -> dict[str, int]:
    return {name: calls[name] for name in (*PER_LAYER, *ONCE)}


def _loras(base: loader.Base, count: int) -> list[Adapter | None]:
    return [tiny.random_lora(base.shape, rank=1 + seed % 16, seed=seed) for seed in range(count)]


def _mixed(base: loader.Base, count: int) -> list[Adapter | None]:
    makers: list[Callable[[int], Adapter]] = [
        lambda seed: tiny.random_lora(base.shape, rank=1 + seed % 16, seed=seed),
        lambda seed: tiny.random_ia3(base.shape, seed=seed),
        lambda seed: tiny.random_prefix(base.shape, length=1 + seed, seed=seed),
        lambda seed: tiny.random_prompt(base.shape, length=1 + seed, seed=seed),
        lambda seed: tiny.random_dora(base.shape, rank=1 + seed % 16, seed=seed),
        lambda seed: tiny.random_bitfit(base.shape, seed=seed),
        lambda seed: tiny.random_bottleneck(base.shape, BottleneckConfig(size=1 + seed % 8), seed=seed),
        lambda seed: tiny.random_bottleneck(base.shape, BottleneckConfig(form=Form.SUM, size=2), seed=seed),
        lambda seed: tiny.random_lora(base.shape, rank=1 + seed % 4, seed=seed, lora_bias=True),
        lambda seed: tiny.random_lora(base.shape, rank=1 + seed % 4, seed=seed, targets=("lm_head",)),
    ]
    return [makers[seed % len(makers)](seed) for seed in range(count)]


def test_calls_do_not_grow_with_adapters(base: loader.Base) -> None:
    step = _step(base, select(base.device, base.dtype))
    one, sixteen, many = (_calls(step, _loras(base, count)) for count in (1, 16, 64))
    assert sixteen == one
    assert many == one
    assert launched(one) == {name: base.shape.num_layers * count for name, count in PER_LAYER.items()} | ONCE


def test_what_a_step_copies_and_allocates_does_not_grow(base: loader.Base) -> None:
    """64 rows over 1, 16 and 64 adapters: equally many operations, copies and bytes; a copy of weights would show."""
    step = Step(base, select(base.device, base.dtype))
    loras = [tiny.random_lora(base.shape, rank=8, seed=seed) for seed in range(64)]

    def counted(num_adapters: int) -> tuple[Counter[str], int]:
        rows = [Row([5], loras[row % num_adapters]) for row in range(64)]
        step.logits(rows)  # slot tables reach their size
        profile = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
        step.logits(rows, around=profile)
        events = profile.key_averages()
        return Counter({event.key: event.count for event in events}), sum(
            max(0, event.self_cpu_memory_usage) for event in events
        )

    one, sixteen, many = map(counted, (1, 16, 64))
    assert sixteen == one
    assert many == one
    operations, num_bytes = one
    assert operations["aten::copy_"] <= COPIES_MAX, "a cast or a copy more in each layer is felt"
    assert num_bytes <= ALLOCATED_BYTES_MAX, "a tensor more in each layer is felt"


def test_calls_of_mixed_methods_do_not_grow(base: loader.Base) -> None:
    step = _step(base, select(base.device, base.dtype))
    _calls(step, _mixed(base, 10))  # hooks for the residual stream are installed once
    assert _calls(step, _mixed(base, 60)) == _calls(step, _mixed(base, 10))


def test_calls_do_not_grow_with_parts(base: loader.Base) -> None:
    """Requests of one part and of eight, among plain ones of every method, which keep all paths open."""
    step = _step(base, select(base.device, base.dtype))
    mixed = [adapter for adapter in _mixed(base, 60) if adapter is not None and not adapter.num_virtual_tokens]
    plain = [Row([5]), *(Row([5], one) for one in mixed[:8])]
    step.logits(plain)  # hooks for the residual stream are installed once

    def composed(num_parts: int) -> _Calls:
        rows = [Row([5], adapters=[(one, 0.5) for one in mixed[i : i + num_parts]]) for i in range(4)]
        step.logits([*rows, *plain])
        return step.runner.calls  # pyright: ignore[reportAttributeAccessIssue]  # set by _step

    assert composed(1) == composed(2) == composed(8)


def test_calls_do_not_grow_with_spans(base: loader.Base) -> None:
    """Requests of one adapter with virtual positions and of three, each at its weight."""
    step = _step(base, select(base.device, base.dtype))
    prefixes = [tiny.random_prefix(base.shape, length=3 + seed, seed=seed) for seed in range(4)]

    def composed(num_parts: int, gate: float) -> _Calls:
        rows = [Row([5], adapters=[(one, gate) for one in prefixes[:num_parts]]) for _ in range(4)]
        step.logits([*rows, Row([5])])
        return step.runner.calls  # pyright: ignore[reportAttributeAccessIssue]  # set by _step

    assert composed(1, 0.5) == composed(3, 0.5)
    assert composed(1, 1.0) == composed(3, 1.0) == composed(0, 1.0)
    weighted = composed(3, 0.5) - composed(3, 1.0)
    assert 0 < weighted.total() < 10, "their weights are packed once for all layers"


def test_calls_do_not_grow_with_token_ranges(base: loader.Base) -> None:
    step = _step(base, select(base.device, base.dtype))
    loras = [(tiny.random_lora(base.shape, rank=2, seed=seed), 1.0) for seed in range(4)]

    def ranged(num_ranges: int) -> _Calls:
        ranges = [tuple(TokenRange(5 * k + j, 5 * k + j + 1) for k in range(num_ranges)) for j in range(4)]
        step.logits([Row([5] * 80, adapters=loras, ranges=ranges), Row([5])])
        return step.runner.calls  # pyright: ignore[reportAttributeAccessIssue]  # set by _step

    assert ranged(1) == ranged(16) == _calls(step, [loras[0][0], None])


def test_calls_do_not_grow_with_mixtures(base: loader.Base) -> None:
    """Nor with rows, experts, top_k or the number of mixtures; one call per layer makes the gates."""
    step = _step(base, select(base.device, base.dtype))

    def mixed(num_mixtures: int, num_experts: int, num_tokens: int = 1, methods: Sequence[str] = DELTAS) -> _Calls:
        listed = [
            made(base.shape, seed=9 * seed, num_experts=num_experts, methods=methods, top_k=1 + seed % num_experts)
            for seed in range(num_mixtures)
        ]
        plain = [Row([5], adapter) for adapter in _mixed(base, 10)]  # these keep all paths open
        step.logits([*plain, *(one._replace(tokens=[5] * num_tokens).row for one in listed)])
        return step.runner.calls  # pyright: ignore[reportAttributeAccessIssue]  # set by _step

    mixed(2, 2)  # hooks are installed once
    few = mixed(1, 2)
    assert mixed(8, 2) == few
    assert mixed(2, 12) == few
    assert mixed(2, 2, num_tokens=40) == few
    assert mixed(8, 4, 3, VIRTUAL) == mixed(1, 1, 1, VIRTUAL), "whose experts bring virtual positions"
    assert few["routing.py:route"] == base.shape.num_layers
    assert _calls(step, _mixed(base, 10))["inject.py:AdapterContext._enter"] == 0, "who has no mixture pays nothing"


def test_calls_do_not_grow_with_tokens(base: loader.Base) -> None:
    step = _step(base, select(base.device, base.dtype))
    assert _calls(step, _loras(base, 4), num_tokens=50) == _calls(step, _loras(base, 4), num_tokens=2)


def test_a_base_only_step_asks_no_driver(base: loader.Base) -> None:
    step = _step(base, select(base.device, base.dtype))
    calls = _calls(step, [None] * 8)
    assert calls["driver.py:CpuDriver.apply"] == calls["driver.py:CpuDriver.apply_group"] == 0
    without = dict.fromkeys(("deltas.py:post", "deltas.py:pre"), 0)
    assert (
        launched(calls) == {name: base.shape.num_layers * count for name, count in PER_LAYER.items()} | ONCE | without
    )


def test_the_count_would_see_a_loop_over_adapters(base: loader.Base) -> None:
    """Negative control: the reference driver does loop over segments, and the counter shows it."""
    step = _step(base, REFERENCE)
    assert _calls(step, _loras(base, 16)).total() > 2 * _calls(step, _loras(base, 1)).total()


def test_a_step_allocates_no_copy_of_adapter_weights(base: loader.Base) -> None:
    """Bytes that torch allocates in a step do not grow with the adapters' sizes."""
    kernels = select(base.device, base.dtype)

    def allocated(rank: int) -> int:
        step = Step(base, kernels)
        adapters = [tiny.random_lora(base.shape, rank=rank, seed=seed) for seed in range(8)]
        rows = [Row([5], adapter) for adapter in adapters]
        step.logits(rows)
        profile = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
        step.logits(rows, around=profile)
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    assert allocated(64) == allocated(1) > 0


def test_rows_pay_for_what_they_have_not_for_what_is_resident(base: loader.Base) -> None:
    """Unused adapters act at every site; a step with an IA³ calls kernels only at the sites of the IA³."""
    step = _step(base, select(base.device, base.dtype))
    for seed in range(3):
        resident = packed_adapter.build(tiny.random_lora(base.shape, rank=2, seed=seed), base.shape, dtype=base.dtype)
        assert step.runner.slots.put(resident) is not None
    calls = _calls(step, [tiny.random_ia3(base.shape, seed=9), None])
    assert calls["deltas.py:post"] == 2 * base.shape.num_layers, "k and v"
    assert calls["deltas.py:pre"] == base.shape.num_layers, "down"
    assert _calls(step, _loras(base, 2))["deltas.py:post"] == 7 * base.shape.num_layers
