"""Composition logits equal the formula, whatever is mixed: out = y + Σ w · delta(x, y), per request, in one batch.

The oracle (textbook_composition.py) hooks a stock transformers model. Errors are relative: ‖got - wanted‖ over
‖wanted‖, over all logits of a prompt.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.mixing.compositions import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    NF4_TOLERANCE,
    PARTS_MAX,
    VIRTUAL,
    mixes,
    rows,
)
from tests.mixing.exact import exact_step
from tests.serving import Row, Step, error, selected
from weft.kernels.selection import REFERENCE
from weft.methods.checkpoint import directory
from weft.methods.protocol import SiteKind
from weft.model.loader import Base


def test_the_mixes_are_what_they_should_be(base: Base) -> None:
    parts = [part for mix in mixes(base.shape, seed=1) for part in mix.parts]
    assert {len(mix.parts) for mix in mixes(base.shape, seed=1)} == set(range(1, PARTS_MAX + 1))
    names = {adapter.method.name for adapter, _ in parts}
    assert names >= {"lora", "dora", "vera", "bitfit", "ia3", "bottleneck"}
    assert names & set(VIRTUAL)
    counts = [sum(a.prefix is not None for a, _ in mix.parts) for mix in mixes(base.shape, seed=1)]
    assert {0, 1, 2} < set(counts)
    assert {weight == 1 for adapter, weight in parts if adapter.prefix is not None} == {True, False}
    assert min(a.rank for a, _ in parts if a.method.name == "lora") <= 3
    assert max(a.rank for a, _ in parts) == 64
    assert min(weight for _, weight in parts) < -1


def test_logits_equal_the_formula_in_float64(base: Base, exact: Base, stock: Any) -> None:
    made = mixes(base.shape, seed=1)
    got = exact_step(exact, rows(made)).logits(rows(made))
    for mix, mine in zip(made, got, strict=True):
        assert mine.dtype == torch.float64
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT64_TOLERANCE
        # Negative control: the formula with one weight changed by a thousandth differs.
        adapter, weight = mix.parts[0]
        if adapter.prefix is None:
            moved = [(adapter, weight + 1e-3), *mix.parts[1:]]
            assert error(mine, textbook.logits(stock, mix.tokens, moved)) > 10 * FLOAT64_TOLERANCE


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: Base, stock: Any) -> None:
    made = mixes(base.shape, seed=3, count=8)
    got = Step(base, REFERENCE if kernels == "reference" else selected(base)).logits(rows(made))
    for mix, mine in zip(made, got, strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT32_TOLERANCE


def test_logits_equal_the_formula_on_nf4(nf4_and_stock: tuple[Base, Any]) -> None:
    nf4, stock = nf4_and_stock
    made = mixes(nf4.shape, seed=4, count=8)
    got = Step(nf4, selected(nf4)).logits(rows(made))
    plain = Step(nf4, selected(nf4)).logits([Row(mix.tokens) for mix in made])
    for mix, mine, without in zip(made, got, plain, strict=True):
        wanted = textbook.logits(stock, mix.tokens, mix.parts)
        assert error(mine, wanted) < NF4_TOLERANCE
        assert error(without, wanted) > 5 * NF4_TOLERANCE, "negative control"


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (-1.5, 2.0, 0.25), (1.0, 1.0, 1.0)])
def test_lora_compositions_equal_peft_s_concatenation(
    weights: tuple[float, ...], path: Path, base: Base, tmp_path: Path
) -> None:
    """Unequal ranks and modules; PEFT merges them into one adapter, here nothing is merged."""
    suffixes = sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)})
    adapters = [
        tiny.random_lora(base.shape, rank=4, seed=31),
        tiny.random_lora(base.shape, rank=9, seed=32, targets=tuple(suffixes[:2])),
        tiny.random_lora(base.shape, rank=1, seed=33, targets=tuple(suffixes[1:])),
    ]
    names = ["a", "b", "c"]
    for name, adapter in zip(names, adapters, strict=True):
        directory.write(adapter, tmp_path / name, base.shape)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(stock, str(tmp_path / "a"), adapter_name="a")
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    tokens = list(range(40, 73))
    with torch.no_grad():
        wanted = model.eval()(input_ids=torch.tensor([tokens])).logits[0]
    parts = list(zip(adapters, weights, strict=True))
    for kernels in (REFERENCE, selected(base)):
        (got,) = Step(base, kernels).logits([Row(tokens, adapters=parts)])
        assert error(got, wanted) < FLOAT32_TOLERANCE
        (other,) = Step(base, kernels).logits([Row(tokens, adapters=parts[:2])])
        assert error(other, wanted) > 100 * FLOAT32_TOLERANCE, "negative control"
