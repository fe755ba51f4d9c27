"""The real demo's adapters: `python -m weft_training.demo.real.adapters` trains them all into adapters_store/real.

Three adapters, one for each task, and a mixture of them, whose router reads a text once and detects its task. They are
small and written in bfloat16, so that a repository can hold them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from weft.config import ModelConfig, Quantization
from weft.methods.lora.math import LoraConfig
from weft.methods.mixture import Level
from weft.methods.protocol import MethodConfig
from weft.model.packed import multiplies_bfloat16
from weft_training import shipped
from weft_training.config import SaveDtype, TrainConfig
from weft_training.data import Conversation
from weft_training.demo.adapters import Names, Output, chosen
from weft_training.demo.real import model
from weft_training.demo.real.contacts import CONTACTS
from weft_training.demo.real.figures import FIGURES
from weft_training.demo.real.mails import MAILS
from weft_training.demo.real.task import RealTask, conversation
from weft_training.demo.real.tasks import TASKS
from weft_training.demo.real.tickets import TICKETS
from weft_training.demo.tasks import Split
from weft_training.mixture import MixtureTrainConfig
from weft_training.progress import ProgressBar, Report
from weft_training.run import TrainResult
from weft_training.trainer import train

MIXTURE = "assistant"
_LORA = LoraConfig(rank=4, alpha=8.0)
_NUM_EXAMPLES = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training recipe of one adapter, on rows that the evaluation does not use."""

    task: RealTask
    adapter: MethodConfig
    learning_rate: float
    num_steps: int
    batch_size: int
    seed: int = 0


RECIPES: Mapping[str, Recipe] = {
    task.name: Recipe(task=task, adapter=_LORA, learning_rate=learning_rate, num_steps=num_steps, batch_size=8)
    for task, learning_rate, num_steps in ((MAILS, 1e-3, 80), (TICKETS, 1e-3, 80), (FIGURES, 3e-3, 160))
}

# Trained during the live demo.
LIVE = Recipe(task=CONTACTS, adapter=_LORA, learning_rate=3e-3, num_steps=32, batch_size=4)


def train_recipe(
    recipe: Recipe, output: Path, *, num_threads: int = 0, overwrite: bool = False, progress: Report | None = None
) -> TrainResult:
    """Train an adapter on the model as it is stored; it can be served on any quantization of it."""
    config = TrainConfig(
        **_common(num_threads),
        adapter=recipe.adapter,
        output=output,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        num_warmup_steps=max(1, recipe.num_steps // 10),
        seed=recipe.seed,
        overwrite=overwrite,
    )
    return train(config, examples=_rows(recipe.task, recipe.seed), progress=progress)


def train_mixture(output: Path, experts: Sequence[Path], *, num_threads: int, progress: Report) -> TrainResult:
    """Train the router over the adapters of all tasks, from rows of all tasks."""
    config = TrainConfig(
        **_common(num_threads),
        adapter=MixtureTrainConfig(experts=tuple(experts), top_k=len(experts), level=Level.SEQUENCE, shared=True),
        output=output,
        num_steps=40,
        batch_size=6,
        learning_rate=2e-2,
        num_warmup_steps=4,
        overwrite=True,
    )
    rows = [one for task in TASKS.values() for one in _rows(task, 1, count=400)]
    return train(config, examples=rows, progress=progress)


def _common(num_threads: int) -> dict[str, Any]:
    """Return the settings of every training."""
    base = ModelConfig(path=model.path(), quantization=Quantization.NONE, dtype="float32", num_threads=num_threads)
    return {"model": base, "save_dtype": SaveDtype.BFLOAT16, "autocast": multiplies_bfloat16()}


def _rows(task: RealTask, seed: int, count: int = _NUM_EXAMPLES) -> list[Conversation]:
    return [conversation(one) for one in task.examples(count, seed, Split.TRAIN)]


def main(
    names: Names = None,
    output: Output = shipped.REAL,
    num_threads: Annotated[int, typer.Option(help="CPU threads; 0 for all cores.")] = 0,
) -> None:
    """Train the real demo's adapters (minutes each)."""
    console = Console()
    for name in chosen(names, (*RECIPES, MIXTURE)):
        with ProgressBar(console, name) as bar:
            if name == MIXTURE:
                experts = [output / expert for expert in RECIPES]
                result = train_mixture(output / name, experts, num_threads=num_threads, progress=bar)
            else:
                recipe = RECIPES[name]
                result = train_recipe(recipe, output / name, num_threads=num_threads, overwrite=True, progress=bar)
        console.print(f"{name}: {result.num_parameters:,} parameters, {result.seconds:.0f} s", highlight=False)


if __name__ == "__main__":
    typer.run(main)
