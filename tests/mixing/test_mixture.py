"""Mixture logits equal the formula: a router's gates per token and layer, over experts of many methods, in one batch.

The oracle is textbook_mixture.py. Errors are relative: ‖got - wanted‖ over ‖wanted‖, over all logits of a prompt.
If activations are rounded (NF4, bfloat16), every expert keeps a gate: rounding could decide a choice between two that
are nearly equal.
"""

from typing import Any

import pytest
import torch

from tests.mixing.compositions import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, NF4_TOLERANCE
from tests.mixing.exact import exact_step
from tests.mixing.mixtures import mixtures
from tests.serving import Row, Step, error, selected
from weft.kernels.selection import REFERENCE
from weft.methods.mixture import Level, MixtureParams
from weft.model.loader import Base


def test_the_mixtures_are_what_they_should_be(base: Base) -> None:
    listed = mixtures(base.shape, seed=1)
    assert {mixed.mixture.config.top_k for mixed in listed} == {1, 2, 3, 4, 5}
    for flag in ("shared", "null_expert", "normalize", "rms_norm", "absolute"):
        assert {getattr(mixed.mixture.config, flag) for mixed in listed} == {True, False}, flag
    assert {mixed.mixture.config.level for mixed in listed} == set(Level)
    assert len({expert.method.name for mixed in listed for expert in mixed.experts}) >= 5
    with_virtual = [sum(bool(e.num_virtual_tokens) for e in mixed.experts) for mixed in listed]
    assert {0, 1, 2} <= set(with_virtual)
    assert any(mixed.bounds for mixed in listed)


def test_logits_equal_the_formula_in_float64(base: Base, exact: Base, stock: Any) -> None:
    listed = mixtures(base.shape, seed=1)
    listed_rows = [mixed.row for mixed in listed]
    step = exact_step(exact, listed_rows)
    got = step.logits(listed_rows)
    for index, (mixed, mine) in enumerate(zip(listed, got, strict=True)):
        wanted, gates = mixed.wanted(stock)
        assert mine.dtype == torch.float64
        # Pooled embeddings, bounds and log-gates are kept in float32, so those rows carry its rounding.
        has_virtual = any(expert.num_virtual_tokens for expert in mixed.experts)
        is_rounded = mixed.bounds or has_virtual or mixed.mixture.config.level is Level.SEQUENCE
        assert error(mine, wanted) < (1e-5 if is_rounded else FLOAT64_TOLERANCE), index
        told = step.gates[index]
        assert told is not None
        of_experts = torch.tensor(told.tokens).view(gates.shape[2], -1, len(gates))  # [N, tokens, L]
        torch.testing.assert_close(of_experts.double().permute(2, 1, 0), gates, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(told.mean).double(), gates.mean(1), rtol=0, atol=1e-6)
        # Negative control: the formula with a router that is off by a hundredth differs.
        params = MixtureParams(mixed.mixture.params.weight * 1.01 + 0.01)
        if mixed.mixture.config.top_k > 1 and not mixed.bounds:
            other, _ = mixed._replace(mixture=mixed.mixture._replace(params=params)).wanted(stock)
            assert error(mine, other) > 1e-4, index


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: Base, stock: Any) -> None:
    listed = mixtures(base.shape, seed=31)
    step = Step(base, REFERENCE if kernels == "reference" else selected(base))
    got = step.logits([mixed.row for mixed in listed])
    for index, (mixed, mine) in enumerate(zip(listed, got, strict=True)):
        wanted, gates = mixed.wanted(stock)
        assert error(mine, wanted) < FLOAT32_TOLERANCE, index
        told = step.gates[index]
        assert told is not None
        of_experts = torch.tensor(told.tokens).view(gates.shape[2], -1, len(gates))  # [N, tokens, L]
        torch.testing.assert_close(of_experts.double().permute(2, 1, 0), gates, rtol=0, atol=1e-4)


def test_logits_equal_the_formula_on_nf4(nf4_and_stock: tuple[Base, Any]) -> None:
    """The oracle has the dequantized weights."""
    nf4, stock = nf4_and_stock
    listed = mixtures(nf4.shape, seed=51, all_kept=True)
    got = Step(nf4, selected(nf4)).logits([mixed.row for mixed in listed])
    plain = Step(nf4, selected(nf4)).logits([Row(mixed.tokens) for mixed in listed])
    for mixed, mine, without in zip(listed, got, plain, strict=True):
        wanted, _ = mixed.wanted(stock)
        assert error(mine, wanted) < NF4_TOLERANCE
        assert error(without, wanted) > 3 * NF4_TOLERANCE, "negative control"
