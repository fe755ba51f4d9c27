"""A mixture of task experts, prompted in words: `python -m weft_training.demo.mixtures` trains and measures it.

No request names an adapter; the prompts carry a cue (weft_training/demo/cues.py) that the base does not follow. Each
expert is trained for one task, on prompts with its own cues and without any; the router on all tasks' prompts, with the
experts frozen. The table compares, on unseen inputs: the base alone; each task's best single expert, which a request
would have to name; all experts at once, each at 1/N; Arrow, whose router needs no training, over the experts that are
LoRAs; and the mixture. Experts that are in the directory are not trained again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.config import ModelConfig
from weft.methods import lora
from weft.methods.bottleneck.math import BottleneckConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.mixture import Level
from weft.methods.protocol import MethodConfig
from weft.model import loader
from weft.model.loader import Base
from weft_training import adapter as adapters
from weft_training import expert as experts
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.demo import document
from weft_training.demo.cues import cued_examples
from weft_training.demo.evaluate import Generator, answers
from weft_training.demo.tasks import TASKS, Split, examples, prompt
from weft_training.demo.weighted import WeightedModel
from weft_training.mixture import MixtureModel, MixtureTrainConfig, TrainedMixture
from weft_training.output import read_mixture
from weft_training.progress import ProgressBar
from weft_training.shipped import BASE
from weft_training.tools import arrow
from weft_training.trainer import train

EXPERTS = Path("build/mixtures")
RESULTS = Path("benchmarks/results/mixtures.json")
NUM_EXAMPLES = 100
EVALUATION_SEED = 5  # cues, steps and learning rate were chosen on other draws
TASK_NAMES: Sequence[str] = ("reverse", "upper", "caesar", "zigzag")
_MARKER = "mixtures"
_NUM_THREADS = 1
_LORA = LoraConfig(rank=8, alpha=16.0)
_BOTTLENECK = BottleneckConfig(size=16)

# The mixture's experts are of two methods; Arrow takes only LoRAs.
MIXED: Mapping[str, MethodConfig] = {
    "reverse-lora": _LORA,
    "upper-bottleneck": _BOTTLENECK,
    "caesar-lora": _LORA,
    "zigzag-bottleneck": _BOTTLENECK,
}
LORAS: Mapping[str, MethodConfig] = {f"{task}-lora": _LORA for task in TASK_NAMES}

_CONFIG = partial(TrainConfig, model=ModelConfig(path=BASE, num_threads=_NUM_THREADS), batch_size=16, overwrite=True)
ROUTER = MixtureTrainConfig(level=Level.SEQUENCE, shared=True, top_k=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Exact match (0 to 1) by task; train_s: seconds of training beyond the experts'."""

    name: str
    by_task: Mapping[str, float]
    train_s: float = 0.0


def train_expert(name: str, config: MethodConfig, output: Path) -> None:
    """Train a task's adapter on the NF4 base, from prompts with the task's cues and without any."""
    task = name.partition("-")[0]
    rows = [Example(text, one.output) for text, one in cued_examples(task, 4000, 0, Split.TRAIN)]
    rows += [Example(prompt(one), one.output) for one in examples(TASKS[task], 1000, 5, Split.TRAIN)]
    _train(_CONFIG(adapter=config, output=output, num_steps=160, learning_rate=5e-3, num_warmup_steps=8), rows)


def train_router(output: Path, paths: Sequence[Path]) -> float:
    """Train the router over the experts in `paths`, on all tasks' cued prompts. Returns the seconds that it took."""
    rows = [Example(text, one.output) for task in TASK_NAMES for text, one in cued_examples(task, 1000, 0, Split.TRAIN)]
    adapter = replace(ROUTER, experts=tuple(paths))
    config = _CONFIG(adapter=adapter, output=output, num_steps=400, learning_rate=2e-3, num_warmup_steps=10)
    return _train(config, rows)


def _train(config: TrainConfig, rows: Sequence[Example]) -> float:
    with ProgressBar(Console(), config.output.name) as bar:
        return train(config, examples=rows, progress=bar).seconds


def scores(name: str, model: Generator, base: Base, tasks: Sequence[str] = TASK_NAMES, train_s: float = 0.0) -> Scores:
    """Score `model` on each task's cued prompts."""
    by_task = {}
    for task in tasks:
        asked = cued_examples(task, NUM_EXAMPLES, EVALUATION_SEED, Split.TEST)
        found = answers(model, base.tokenizer, [text for text, _ in asked])
        right = sum(answer == one.output for answer, (_, one) in zip(found, asked, strict=True))
        by_task[task] = right / len(asked)
    return Scores(name=name, by_task=by_task, train_s=train_s)


def measure(base: Base, root: Path, router: Path, train_s: float) -> list[Scores]:
    """Return all rows of the table."""
    held = {name: adapters.read(root / name, base.shape) for name in {**MIXED, **LORAS}}
    singles = [
        scores(name, WeightedModel(base, [(adapter, 1.0)]), base, [name.partition("-")[0]])
        for name, adapter in held.items()
    ]
    best = {task: max(one.by_task.get(task, 0.0) for one in singles) for task in TASK_NAMES}
    average = WeightedModel(base, [(held[name], 1 / len(MIXED)) for name in MIXED])
    return [
        scores("base alone", base.model, base),
        Scores(name="best single expert, named", by_task=best),
        scores("uniform average", average, base),
        scores("Arrow, 4 LoRAs", arrow_model(base, [root / name for name in LORAS]), base),
        scores("mixture", mixture_model(base, router, [root / name for name in MIXED]), base, train_s=train_s),
    ]


def arrow_model(base: Base, paths: Sequence[Path]) -> MixtureModel:
    """Return a mixture of LoRAs with Arrow's router."""
    found = experts.read(paths, base.shape)
    assert all(one.adapter.method is lora.METHOD for one in found)
    readers = arrow.norm_readers(base.model, base.shape)
    params = arrow.router(readers, [one.adapter.sites for one in found], base.shape)
    config = arrow.config(len(found), top_k=2, temperature=1.0)
    return MixtureModel(base, TrainedMixture(config, params, found, writes_experts=False))


def mixture_model(base: Base, router: Path, paths: Sequence[Path]) -> MixtureModel:
    """Return the mixture in a directory, over the experts that it names."""
    made = read_mixture(router, base.shape)
    found = experts.read(paths, base.shape)
    if [one.digest for one in made.experts] != [one.digest for one in found]:
        raise ValueError(f"experts: {router} names others than those in {paths[0].parent}")
    return MixtureModel(base, TrainedMixture(made.config, made.params, found, writes_experts=False))


def cells(found: Sequence[Scores]) -> list[list[str]]:
    """Return the table's cells, header first."""
    return [["", *TASK_NAMES], *([one.name, *(f"{one.by_task[task]:.0%}" for task in TASK_NAMES)] for one in found)]


def main(
    root: Annotated[Path, typer.Option("--experts", help="Directory of the experts and of the mixture.")] = EXPERTS,
    results: Annotated[Path, typer.Option(help="JSON file of the measurements.")] = RESULTS,
    markdown_file: Annotated[Path | None, document.option(_MARKER)] = None,
) -> None:
    """Train experts and a router for prompts with cues, and compare them with the alternatives."""
    for name, config in {**MIXED, **LORAS}.items():
        if not (root / name).exists():
            train_expert(name, config, root / name)
    train_s = train_router(root / "mixture", [root / name for name in MIXED])
    base = loader.load(ModelConfig(path=BASE, num_threads=_NUM_THREADS), attention="eager")
    found = measure(base, root, root / "mixture", train_s)
    results.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    title = f"exact match on {NUM_EXAMPLES} held-back prompts with cues, NF4 base"
    document.publish(title, cells(found), markdown_file, _MARKER)


if __name__ == "__main__":
    typer.run(main)
