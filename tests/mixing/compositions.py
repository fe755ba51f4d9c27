"""Compositions of adapters of every method, drawn at random, and the tolerances of their logits."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests import tiny
from tests.mixing.textbook_composition import Composition
from tests.serving import Row
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.protocol import Adapter, BaseShape, SiteKind

FLOAT64_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 2e-5
NF4_TOLERANCE = 0.06  # bfloat16 activations, as tests/methods/test_nf4.py states for one adapter
PARTS_MAX = 8
_NUM_MIXES = 16
_VIRTUAL_WEIGHTS = (0.01, 0.3, 1.0, 1.0, 2.5, 4.0)  # of virtual positions
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
    """Return random compositions of 1 to 8 parts; up to three of them of virtual positions."""
    dice = random.Random(seed)
    deltas = [name for name in MAKERS if name not in VIRTUAL]
    made = []
    for index in range(count):
        num_parts = 1 + index % PARTS_MAX
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


def rows(made: list[Mix]) -> list[Row]:
    return [Row(mix.tokens, adapters=mix.parts) for mix in made]


def virtual_mixes(base: BaseShape, *, seed: int, count: int = 16) -> list[Mix]:
    """Return compositions of 1 to 8 parts; 1 to 4 of them have virtual positions, of soft prompts and of prefixes."""
    dice = random.Random(seed)
    deltas = [name for name in MAKERS if name not in VIRTUAL]
    made = []
    for index in range(count):
        num_virtual = 1 + index % 4
        names = [VIRTUAL[(index + n) % 2] for n in range(num_virtual)]
        names += [dice.choice(deltas) for _ in range(dice.randrange(0, 9 - num_virtual))]
        dice.shuffle(names)
        parts = [
            (
                MAKERS[name](base, dice, dice.randrange(10**6)),
                _virtual_weight(dice) if name in VIRTUAL else weight_of(dice),
            )
            for name in names
        ]
        made.append(Mix([dice.randrange(1, tiny.VOCAB_SIZE) for _ in range(dice.randrange(1, 40))], parts))
    return made


def _virtual_weight(dice: random.Random) -> float:
    """Draw a weight that float32 holds."""
    return torch.tensor(dice.choice(_VIRTUAL_WEIGHTS), dtype=torch.float32).item()


def virtual_parts(parts: Composition) -> list[int]:
    return [index for index, (adapter, _) in enumerate(parts) if adapter.prefix is not None]


def moved(parts: Composition) -> Composition:
    """The same with the first virtual part's weight changed by a tenth."""
    index = virtual_parts(parts)[0]
    adapter, weight = parts[index]
    return [*parts[:index], (adapter, 1.1 * weight), *parts[index + 1 :]]
