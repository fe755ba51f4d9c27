"""Style adapters, and their composition with task adapters: `python -m weft_training.demo.styles`.

A style decides how an answer is written, whatever the question. Its adapter learns from the base's own tagged tasks,
with the answers in that style, and without any other adapter. In a composition the task's adapter decides what to
answer and the style's how: `alehug = ` with reverse-lora and capitals-lora is answered GUHELA, which neither of the two
gives alone.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.config import ModelConfig
from weft.methods.lora.math import LoraConfig
from weft.model import loader
from weft.model.loader import Base
from weft_training import adapter as adapters
from weft_training import shipped
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.demo import document
from weft_training.demo.evaluate import answers
from weft_training.demo.tasks import TASKS, Split, examples, prompt
from weft_training.demo.weighted import WeightedModel
from weft_training.progress import ProgressBar
from weft_training.trainer import train

RESULTS = Path("benchmarks/results/compositions.json")
NUM_EXAMPLES = 100
EVALUATION_SEED = 5  # the weights were chosen on another draw
_MARKER = "compositions"
_NUM_THREADS = 1
_NUM_EXAMPLES_PER_TASK = 1500

STYLES: Mapping[str, Callable[[str], str]] = {"capitals": str.upper, "exclaim": lambda answer: f"{answer}!"}
# Tasks that the base solves with a tag; `upper` would leave nothing to learn for one of the styles.
_TAUGHT = ("reverse", "double", "sort", "rotate", "devowel", "stars", "caesar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A task's adapter and styles, each with its weight. right: share of the answers that are exactly right."""

    task: str
    weights: Mapping[str, float]
    right: float = 0.0
    samples: Sequence[tuple[str, str]] = ()

    @property
    def styles(self) -> list[str]:
        """Styles in the order of their names; the order does not matter, since no style undoes another."""
        return sorted(set(STYLES) & {name.removesuffix("-lora") for name in self.weights})

    def wanted(self, text: str) -> str:
        """Return the task's answer, in every style."""
        answer = TASKS[self.task].function(text)
        for style in self.styles:
            answer = STYLES[style](answer)
        return answer


COMPOSITIONS: Sequence[Composition] = (
    Composition(task="reverse", weights={"reverse-lora": 1.0}),
    Composition(task="reverse", weights={"reverse-lora": 0.9, "capitals-lora": 0.9}),
    Composition(task="reverse", weights={"reverse-lora": 1.0, "exclaim-lora": 0.8}),
    Composition(task="caesar", weights={"caesar-lora": 1.0, "exclaim-lora": 1.0}),
    Composition(task="reverse", weights={"reverse-lora": 1.0, "capitals-lora": 1.0, "exclaim-lora": 0.8}),
)


def train_style(style: str, output: Path) -> None:
    """Train a style's adapter on the NF4 base, from tagged prompts, and write it to `output`."""
    rows = [
        Example(prompt(one, tagged=True), STYLES[style](one.output))
        for seed, task in enumerate(_TAUGHT, start=10)
        for one in examples(TASKS[task], _NUM_EXAMPLES_PER_TASK, seed, Split.TRAIN)
    ]
    random.Random(0).shuffle(rows)  # noqa: S311  reproducible, not secret
    config = TrainConfig(
        model=ModelConfig(path=shipped.BASE, num_threads=_NUM_THREADS),
        adapter=LoraConfig(rank=8, alpha=16.0),
        output=output,
        num_steps=300,
        batch_size=32,
        learning_rate=3e-3,
        num_warmup_steps=15,
        overwrite=True,
    )
    with ProgressBar(Console(), output.name) as bar:
        train(config, examples=rows, progress=bar)


def measure(base: Base, composition: Composition) -> Composition:
    """Return the composition with its answers to unseen inputs."""
    parts = []
    for name, weight in composition.weights.items():
        where = shipped.STYLES if name.removesuffix("-lora") in STYLES else shipped.ADAPTERS
        parts.append((adapters.read(where / name, base.shape), weight))
    asked = examples(TASKS[composition.task], NUM_EXAMPLES, EVALUATION_SEED, Split.TEST)
    found = answers(WeightedModel(base, parts), base.tokenizer, [prompt(one) for one in asked])
    right = sum(answer == composition.wanted(one.input) for answer, one in zip(found, asked, strict=True))
    samples = [(one.input, answer) for one, answer in zip(asked[:3], found, strict=False)]
    return Composition(task=composition.task, weights=composition.weights, right=right / len(asked), samples=samples)


def rows(found: Sequence[Composition]) -> list[list[str]]:
    """Return the table's cells, header first."""
    head = ["composition", "answers", f"right of {NUM_EXAMPLES}"]
    return [head] + [
        [
            " + ".join(f"{weight:g} · {name}" for name, weight in one.weights.items()),
            ", ".join(f"{text} = {answer}" for text, answer in one.samples),
            f"{one.right:.0%}",
        ]
        for one in found
    ]


def main(
    trains: Annotated[bool, typer.Option("--train", help="Train the styles' adapters again first.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file of the measurements.")] = RESULTS,
    markdown_file: Annotated[Path | None, document.option(_MARKER)] = None,
) -> None:
    """Measure compositions of a task and a style: exact match on held-back inputs."""
    if trains:
        for style in STYLES:
            train_style(style, shipped.STYLES / f"{style}-lora")
    base = loader.load(ModelConfig(path=shipped.BASE, num_threads=_NUM_THREADS), attention="sdpa")
    found = [measure(base, composition) for composition in COMPOSITIONS]
    results.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    title = "exact match of compositions on held-back inputs, NF4 base"
    document.publish(title, rows(found), markdown_file, _MARKER, num_names=3)


if __name__ == "__main__":
    typer.run(main)
