"""Mixture logits equal the formula: a router's gates per token and layer, over experts of many methods, in one batch.

The oracle is textbook_mixture.py. Errors are relative: ‖got - wanted‖ over ‖wanted‖, over all logits of a prompt.
If activations are rounded (NF4, bfloat16), every expert keeps a gate: rounding could decide a choice between two that
are nearly equal.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.mixing import textbook_mixture as textbook
from tests.mixing.test_composition import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    MAKERS,
    NF4_TOLERANCE,
    ExactSlots,
    error,
    nf4_and_stock,
    selected,
)
from tests.serving import Row, Step
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.config import ModelConfig, Quantization
from weft.engine.request import ExpertBound
from weft.kernels.selection import REFERENCE
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import Adapter, BaseShape
from weft.model import loader, paged_attention


class Mixed(NamedTuple):
    """A prompt, its mixture, and the experts."""

    tokens: list[int]
    mixture: Mixture
    experts: list[Adapter]
    bounds: tuple[ExpertBound, ...] = ()

    @property
    def row(self) -> Row:
        adapters = [(expert, 1.0) for expert in self.experts]
        return Row(self.tokens, adapters=adapters, mixture=self.mixture, bounds=self.bounds)

    def wanted(self, stock: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return textbook.logits(stock, self.tokens, self.mixture, self.experts, self.bounds)


def made(
    base: BaseShape,
    *,
    seed: int,
    num_experts: int,
    scale: float = 0.5,
    bounded: bool = False,
    methods: Sequence[str] = tuple(MAKERS),
    **config: Any,
) -> Mixed:
    """A random prompt, router and experts, one of each method first."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    read = MixtureConfig(num_experts=num_experts, **config)
    shape = (1 if read.shared else base.num_layers, read.num_choices, base.embedding_size)
    experts = [MAKERS[methods[(seed + i) % len(methods)]](base, dice, 100 * seed + i) for i in range(num_experts)]
    mixture = Mixture(
        read,
        MixtureParams(torch.randn(shape, generator=generator) * scale),
        tuple(Expert(f"{index:064x}") for index in range(num_experts)),
    )
    tokens = [dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 30))]
    bounds = ()
    if bounded:
        bounds = (ExpertBound(False), ExpertBound(True, 0.25), *[ExpertBound(True, 0.0, 0.375)] * (num_experts - 2))
    return Mixed(tokens, mixture, experts, bounds)


def mixtures(base: BaseShape, *, seed: int, all_kept: bool = False) -> list[Mixed]:
    """Every top_k of five experts, both levels, shared and not, with and without a null expert, normalized and not."""
    listed: list[Mixed] = []
    for index in range(12):
        null_expert = index % 2 == 1
        listed.append(
            made(
                base,
                seed=seed + index,
                num_experts=5,
                bounded=index % 4 == 3,
                top_k=5 + null_expert if all_kept else 1 + index % 5,
                shared=index % 3 == 0,
                null_expert=null_expert,
                normalize=index % 5 != 0,
                rms_norm=index % 4 == 1,
                absolute=index % 4 == 2,
                temperature=0.5 + index % 3,
                level=Level.SEQUENCE if index % 3 == 2 else Level.TOKEN,
            )
        )
    return listed


class ExactRouters(ExactSlots):
    """Gives routers in float64 too. routers: those that are placed next, in order."""

    coming_routers: list[Mixture]
    exact_routers: dict[AdapterSlot, Mixture]

    def put(self, packed: PackedAdapter) -> AdapterSlot | None:
        if packed.router is None:
            return super().put(packed)
        slot = SlotTable.put(self, packed)
        assert slot is not None
        self.exact_routers[slot] = self.coming_routers.pop(0)
        return slot

    def router(self, slot: AdapterSlot) -> tuple[MixtureConfig, MixtureParams]:
        if slot not in self.exact_routers:
            return super().router(slot)
        mixture = self.exact_routers[slot]
        return mixture.config, MixtureParams(mixture.params.weight.double())


def exact_step(path: Path, listed: list[Mixed]) -> Step:
    """Return the serving path's results in float64, with the reference driver and reference attention."""
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    held = loader.load(config, attention=paged_attention.ATTENTION)
    step = Step(replace(held, model=held.model.double(), dtype=torch.float64), REFERENCE)
    slots: Any = step.runner.slots
    slots.__class__ = ExactRouters
    slots.coming, slots.exact = [expert for mixed in listed for expert in mixed.experts], {}
    slots.coming_routers, slots.exact_routers = [mixed.mixture for mixed in listed], {}
    return step


def test_the_mixtures_are_what_they_should_be(base: loader.Base) -> None:
    listed = mixtures(base.shape, seed=1)
    assert {mixed.mixture.config.top_k for mixed in listed} == {1, 2, 3, 4, 5}
    for flag in ("shared", "null_expert", "normalize", "rms_norm", "absolute"):
        assert {getattr(mixed.mixture.config, flag) for mixed in listed} == {True, False}, flag
    assert {mixed.mixture.config.level for mixed in listed} == set(Level)
    assert len({expert.method.name for mixed in listed for expert in mixed.experts}) >= 5
    with_virtual = [sum(bool(e.num_virtual_tokens) for e in mixed.experts) for mixed in listed]
    assert {0, 1, 2} <= set(with_virtual)
    assert any(mixed.bounds for mixed in listed)


def test_logits_equal_the_formula_in_float64(path: Path, base: loader.Base, stock: Any) -> None:
    listed = mixtures(base.shape, seed=1)
    step = exact_step(path, listed)
    got = step.logits([mixed.row for mixed in listed])
    for index, (mixed, mine) in enumerate(zip(listed, got, strict=True)):
        wanted, gates = mixed.wanted(stock)
        assert mine.dtype == torch.float64
        # Pooled embeddings, bounds and log-gates are kept in float32, so those rows carry its rounding.
        has_virtual = any(expert.num_virtual_tokens for expert in mixed.experts)
        is_rounded = mixed.bounds or has_virtual or mixed.mixture.config.level is Level.SEQUENCE
        assert error(mine, wanted) < (1e-5 if is_rounded else FLOAT64_TOLERANCE), index
        told = step.gates[index]
        assert told is not None
        torch.testing.assert_close(torch.tensor(told.tokens).double().transpose(0, 1), gates, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(told.mean).double(), gates.mean(1), rtol=0, atol=1e-6)
        # Negative control: the formula with a router that is off by a hundredth differs.
        params = MixtureParams(mixed.mixture.params.weight * 1.01 + 0.01)
        if mixed.mixture.config.top_k > 1 and not mixed.bounds:
            other, _ = mixed._replace(mixture=mixed.mixture._replace(params=params)).wanted(stock)
            assert error(mine, other) > 1e-4, index


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: loader.Base, stock: Any) -> None:
    listed = mixtures(base.shape, seed=31)
    step = Step(base, REFERENCE if kernels == "reference" else selected(base))
    got = step.logits([mixed.row for mixed in listed])
    for index, (mixed, mine) in enumerate(zip(listed, got, strict=True)):
        wanted, gates = mixed.wanted(stock)
        assert error(mine, wanted) < FLOAT32_TOLERANCE, index
        told = step.gates[index]
        assert told is not None
        torch.testing.assert_close(torch.tensor(told.tokens).double().transpose(0, 1), gates, rtol=0, atol=1e-4)


def test_logits_equal_the_formula_on_nf4(tmp_path: Path) -> None:
    """The oracle has the dequantized weights."""
    nf4, stock = nf4_and_stock(tiny.save_base(tmp_path))
    listed = mixtures(nf4.shape, seed=51, all_kept=True)
    got = Step(nf4, selected(nf4)).logits([mixed.row for mixed in listed])
    plain = Step(nf4, selected(nf4)).logits([Row(mixed.tokens) for mixed in listed])
    for mixed, mine, without in zip(listed, got, plain, strict=True):
        wanted, _ = mixed.wanted(stock)
        assert error(mine, wanted) < NF4_TOLERANCE
        assert error(without, wanted) > 3 * NF4_TOLERANCE, "negative control"
