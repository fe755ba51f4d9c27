"""Composition logits equal the formula, whatever is mixed: out = y + Σ w · delta(x, y), per request, in one batch.

The oracle (textbook_composition.py) hooks a stock transformers model. Errors are relative: ‖got - wanted‖ over
‖wanted‖, over all logits of a prompt.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.mixing import textbook_composition as textbook
from tests.mixing.textbook_composition import Composition
from tests.serving import Row, Step
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.config import ModelConfig, Quantization
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.checkpoint import directory
from weft.methods.inject import AdaptedLinear
from weft.methods.protocol import Adapter, BaseShape, SiteKind
from weft.model import loader, paged_attention

FLOAT64_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 2e-5
NF4_TOLERANCE = 0.06  # bfloat16 activations, as tests/methods/test_nf4.py states for one adapter
_PARTS_MAX = 8
_NUM_MIXES = 16
_RANKS = (1, 2, 3, 8, 16, 33, 64)

MAKERS: dict[str, Callable[[BaseShape, random.Random, int], Adapter]] = {
    "lora": lambda base, dice, seed: tiny.random_lora(base, rank=dice.choice(_RANKS), seed=seed),
    "lora, some modules": lambda base, dice, seed: tiny.random_lora(
        base, rank=dice.choice(_RANKS), seed=seed, targets=_some_suffixes(base, dice)
    ),
    "lora, bias": lambda base, dice, seed: tiny.random_lora(base, rank=dice.choice(_RANKS), seed=seed, lora_bias=True),
    "lora, head": lambda base, dice, seed: tiny.random_lora(base, rank=3, seed=seed, targets=("lm_head",)),
    "dora": lambda base, dice, seed: tiny.random_dora(base, rank=dice.choice(_RANKS), seed=seed),
    "vera": lambda base, dice, seed: tiny.random_vera(base, rank=dice.choice(_RANKS), seed=seed),
    "bitfit": lambda base, dice, seed: tiny.random_bitfit(base, seed=seed),
    "ia3": lambda base, dice, seed: tiny.random_ia3(base, seed=seed),
    "bottleneck": lambda base, dice, seed: tiny.random_bottleneck(
        base, BottleneckConfig(form=dice.choice(list(Form)), size=dice.choice(_RANKS)), seed=seed
    ),
    "prefix": lambda base, dice, seed: tiny.random_prefix(base, length=dice.randrange(1, 20), seed=seed),
    "prompt": lambda base, dice, seed: tiny.random_prompt(base, length=dice.randrange(1, 20), seed=seed),
}
VIRTUAL = ("prefix", "prompt")


def _some_suffixes(base: BaseShape, dice: random.Random) -> tuple[str, ...]:
    suffixes = sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR)})
    return tuple(dice.sample(suffixes, dice.randrange(1, len(suffixes))))


class Mix(NamedTuple):
    """A prompt and its composition."""

    tokens: list[int]
    parts: Composition


def weight_of(dice: random.Random) -> float:
    """Draw a weight that is exact in float32, so that the oracle's float64 has the same."""
    return torch.tensor(dice.uniform(-1.5, 1.5), dtype=torch.float32).item()


def virtual_weight_of(dice: random.Random, index: int) -> float:
    """Above 0; 1 in every fifth mix, so that a batch has both."""
    return abs(weight_of(dice)) if index % 5 else 1.0


def mixes(base: BaseShape, *, seed: int, count: int = _NUM_MIXES) -> list[Mix]:
    """Random compositions of 1 to 8 parts; up to three of them of virtual positions."""
    dice = random.Random(seed)
    deltas = [name for name in MAKERS if name not in VIRTUAL]
    made = []
    for index in range(count):
        num_parts = 1 + index % _PARTS_MAX
        names = [dice.choice(deltas) for _ in range(num_parts)]
        for _ in range(index % 4):
            names[dice.randrange(num_parts)] = dice.choice(VIRTUAL)
        parts = [
            (
                MAKERS[name](base, dice, dice.randrange(10**6)),
                virtual_weight_of(dice, index) if name in VIRTUAL else weight_of(dice),
            )
            for name in names
        ]
        made.append(Mix([dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 40))], parts))
    return made


class ExactSlots(SlotTable):
    """Gives the reference driver the packed adapters in float64: slots keep float32, whose rounding would be visible.

    coming: the adapters that are placed next, in order.
    """

    coming: list[Adapter]
    exact: dict[AdapterSlot, Any]

    def put(self, packed: PackedAdapter) -> AdapterSlot | None:
        slot = super().put(packed)
        assert slot is not None
        self.exact[slot] = {site: _doubled(params) for site, params in self.coming.pop(0).sites.items()}
        return slot

    def params(self, slot: AdapterSlot) -> Any:
        return self.exact[slot]


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_doubled, value))
    return value


def exact_logits(path: Path, listed: list[Row]) -> list[Tensor]:
    """Return the serving path's logits in float64, with the reference driver and reference attention."""
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    held = loader.load(config, attention=paged_attention.ATTENTION)
    step = Step(replace(held, model=held.model.double(), dtype=torch.float64), REFERENCE)
    slots: Any = step.runner.slots
    slots.__class__ = ExactSlots
    slots.coming, slots.exact = [adapter for row in listed for adapter, _ in row.parts], {}
    return step.logits(listed)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def rows(made: list[Mix]) -> list[Row]:
    return [Row(mix.tokens, adapters=mix.parts) for mix in made]


def selected(base: loader.Base) -> Kernels:
    chosen = select(base.device, base.dtype)
    assert chosen is not REFERENCE
    return chosen


def test_the_mixes_are_what_they_should_be(base: loader.Base) -> None:
    parts = [part for mix in mixes(base.shape, seed=1) for part in mix.parts]
    assert {len(mix.parts) for mix in mixes(base.shape, seed=1)} == set(range(1, _PARTS_MAX + 1))
    names = {adapter.method.name for adapter, _ in parts}
    assert names >= {"lora", "dora", "vera", "bitfit", "ia3", "bottleneck"}
    assert names & set(VIRTUAL)
    counts = [sum(a.prefix is not None for a, _ in mix.parts) for mix in mixes(base.shape, seed=1)]
    assert {0, 1, 2} < set(counts)
    assert {weight == 1 for adapter, weight in parts if adapter.prefix is not None} == {True, False}
    assert min(a.rank for a, _ in parts if a.method.name == "lora") <= 3
    assert max(a.rank for a, _ in parts) == 64
    assert min(weight for _, weight in parts) < -1


def test_logits_equal_the_formula_in_float64(path: Path, base: loader.Base, stock: Any) -> None:
    made = mixes(base.shape, seed=1)
    got = exact_logits(path, rows(made))
    for mix, mine in zip(made, got, strict=True):
        assert mine.dtype == torch.float64
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT64_TOLERANCE
        # Negative control: the formula with one weight changed by a thousandth differs.
        adapter, weight = mix.parts[0]
        if adapter.prefix is None:
            moved = [(adapter, weight + 1e-3), *mix.parts[1:]]
            assert error(mine, textbook.logits(stock, mix.tokens, moved)) > 10 * FLOAT64_TOLERANCE


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_logits_equal_the_formula_in_float32(kernels: str, base: loader.Base, stock: Any) -> None:
    made = mixes(base.shape, seed=3, count=8)
    got = Step(base, REFERENCE if kernels == "reference" else selected(base)).logits(rows(made))
    for mix, mine in zip(made, got, strict=True):
        assert error(mine, textbook.logits(stock, mix.tokens, mix.parts)) < FLOAT32_TOLERANCE


def nf4_and_stock(path: Path) -> tuple[loader.Base, Any]:
    """Return a base in NF4, and transformers' own model in float64 with its weights dequantized."""
    paged_attention.register()
    nf4 = loader.load(ModelConfig(path=path, device="cpu"), attention=paged_attention.ATTENTION)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").double()
    for name, module in nf4.model.named_modules():
        if isinstance(module, AdaptedLinear) and module.site.kind is SiteKind.LINEAR:
            weight = module.base.weight
            assert isinstance(module.base, bnb.nn.Linear4bit)
            dequantized = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            stock.get_submodule(name).weight.data.copy_(dequantized.double())
    return nf4, stock.eval().requires_grad_(False)


def test_logits_equal_the_formula_on_nf4(tmp_path: Path) -> None:
    nf4, stock = nf4_and_stock(tiny.save_base(tmp_path))
    made = mixes(nf4.shape, seed=4, count=8)
    got = Step(nf4, selected(nf4)).logits(rows(made))
    plain = Step(nf4, selected(nf4)).logits([Row(mix.tokens) for mix in made])
    for mix, mine, without in zip(made, got, plain, strict=True):
        wanted = textbook.logits(stock, mix.tokens, mix.parts)
        assert error(mine, wanted) < NF4_TOLERANCE
        assert error(without, wanted) > 5 * NF4_TOLERANCE, "negative control"


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (-1.5, 2.0, 0.25), (1.0, 1.0, 1.0)])
def test_lora_compositions_equal_peft_s_concatenation(
    weights: tuple[float, ...], path: Path, base: loader.Base, tmp_path: Path
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
        assert error(got, wanted.double()) < FLOAT32_TOLERANCE
        (other,) = Step(base, kernels).logits([Row(tokens, adapters=parts[:2])])
        assert error(other, wanted.double()) > 100 * FLOAT32_TOLERANCE, "negative control"
