"""The demo's adapters: `python -m weft_training.demo.adapters` trains them all into adapters_store/demo.

They differ in method, rank, length and sites on purpose, to be served in one batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.config import ModelConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.protocol import MethodConfig
from weft_training.adapter import USUAL, method_of
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.demo.tasks import TASKS, Split, examples, prompt
from weft_training.progress import ProgressBar, Report
from weft_training.run import TrainResult
from weft_training.shipped import ADAPTERS, BASE
from weft_training.trainer import train


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training recipe of one adapter. num_examples: distinct inputs, from the split for adapters."""

    task: str
    adapter: MethodConfig
    learning_rate: float
    num_steps: int = 200
    batch_size: int = 32
    num_examples: int = 4000

    @property
    def name(self) -> str:
        """`<task>-<method>`."""
        return f"{self.task}-{method_of(self.adapter).name}"


def _lora(task: str, rank: int, *targets: str, num_steps: int = 200) -> Recipe:
    config = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets)
    return Recipe(task=task, adapter=config, learning_rate=5e-3, num_steps=num_steps)


def _ia3(task: str) -> Recipe:
    return Recipe(task=task, adapter=USUAL["ia3"], learning_rate=0.1, num_steps=600)


def _prefix(task: str, num_virtual_tokens: int) -> Recipe:
    config = PrefixConfig(num_virtual_tokens=num_virtual_tokens)
    return Recipe(task=task, adapter=config, learning_rate=0.1, num_steps=300)


RECIPES: Sequence[Recipe] = (
    _lora("reverse", 16, "q_proj", "v_proj", "down_proj"),
    _ia3("reverse"),
    _prefix("reverse", 8),
    _lora("upper", 4),
    _ia3("upper"),
    _prefix("upper", 12),
    _lora("caesar", 8),
    _ia3("caesar"),
    _prefix("caesar", 16),
    # Held out of pre-training: the base lacks the skill, even with a tag.
    _lora("zigzag", 16, "q_proj", "v_proj", "down_proj", num_steps=400),
    _ia3("zigzag"),
    _prefix("zigzag", 16),
)

_NUM_THREADS = 2  # fixed, so that the same machine type reproduces the same tensors

# Trained during the live demo; no committed adapter covers its task.
LIVE = _lora("rotate", 8, num_steps=120)


def train_recipe(
    recipe: Recipe,
    output: Path,
    *,
    base: Path = BASE,
    num_threads: int = 0,
    overwrite: bool = False,
    progress: Report | None = None,
) -> TrainResult:
    """Train an adapter on the NF4 base from untagged prompts and write it to `output`."""
    drawn = examples(TASKS[recipe.task], recipe.num_examples, 0, Split.TRAIN)
    config = TrainConfig(
        model=ModelConfig(path=base, num_threads=num_threads),
        adapter=recipe.adapter,
        output=output,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        num_warmup_steps=recipe.num_steps // 20,
        overwrite=overwrite,
    )
    return train(config, examples=[Example(prompt(one), one.output) for one in drawn], progress=progress)


def chosen(names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names, or all that are known if none is given. Raises BadParameter for an unknown one."""
    every = list(known)
    for name in names or ():
        if name not in every:
            raise typer.BadParameter(f"must be of {', '.join(every)}, given {name!r}")
    return list(names or every)


Names = Annotated[list[str] | None, typer.Argument(help="Adapters to train; all if none is named.")]
Output = Annotated[Path, typer.Option(help="Directory of the adapters; existing ones are replaced.")]


def main(
    names: Names = None,
    base: Annotated[Path, typer.Option(help="The demo base.")] = BASE,
    output: Output = ADAPTERS,
) -> None:
    """Train the demo's adapters."""
    known = {recipe.name: recipe for recipe in RECIPES}
    console = Console()
    for name in chosen(names, known):
        with ProgressBar(console, name) as bar:
            result = train_recipe(
                known[name], output / name, base=base, num_threads=_NUM_THREADS, overwrite=True, progress=bar
            )
        console.print(f"{name}: {result.num_parameters:,} parameters, {result.seconds:.1f} s", highlight=False)


if __name__ == "__main__":
    typer.run(main)
