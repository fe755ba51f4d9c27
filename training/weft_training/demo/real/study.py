"""Quality of the methods on a real language model: `make study-real` (hours; it skips what is already measured).

Each method is trained with one recipe for every task and several seeds, which draw its rows and its initialization. The
evaluation's inputs have names, items and wordings that no adapter has seen. The answers are greedy and come from a
server that holds the base unquantized, as in training. They are compared with those of the base alone, and of the base
with a prompt that gives an instruction and solved inputs.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.client import Client
from weft.methods.bottleneck.math import BottleneckConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft_training.adapter import USUAL
from weft_training.demo import document
from weft_training.demo.adapters import chosen
from weft_training.demo.answering import Ask, answers
from weft_training.demo.real import model
from weft_training.demo.real.adapters import Recipe, train_recipe
from weft_training.demo.real.mails import MAILS
from weft_training.demo.real.task import RealTask, asked, score
from weft_training.demo.real.tasks import TASKS
from weft_training.demo.server import Server, serving
from weft_training.demo.tasks import Split
from weft_training.progress import ProgressBar

RESULTS = Path("benchmarks/results/real.json")
NUM_EXAMPLES = 200
SEEDS = (0, 1, 2)
BASE, PROMPTED = "base", "base, good prompt"
_EVALUATION_SEED = 1
_MARKER = "real"


_NUM_STEPS = 100
_recipe = partial(Recipe, task=MAILS, num_steps=_NUM_STEPS, batch_size=4)

# The recipe of each method; its task is replaced.
METHODS: Mapping[str, Recipe] = {
    "lora": _recipe(adapter=LoraConfig(rank=8, alpha=16.0), learning_rate=4e-3),
    "bottleneck": _recipe(adapter=BottleneckConfig(size=16), learning_rate=4e-3),
    "ia3": _recipe(adapter=USUAL["ia3"], learning_rate=6e-2),
    "prefix": _recipe(adapter=PrefixConfig(num_virtual_tokens=16), learning_rate=1e-1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. exact, f1: shares, 0 to 1. seed: of the training; 0 if nothing is trained."""

    method: str
    task: str
    seed: int
    exact: float
    f1: float
    num_parameters: int = 0
    num_steps: int = 0
    train_s: float = 0.0


def missing(known: Sequence[Cell]) -> Iterator[tuple[str, RealTask, int]]:
    """Yield method, task and seed of each cell that is not measured; one seed of all methods before the next seed."""
    held = {(cell.method, cell.task, cell.seed) for cell in known}
    for seed in SEEDS:
        for method in (BASE, PROMPTED, *METHODS) if seed == SEEDS[0] else METHODS:
            for task in TASKS.values():
                if (method, task.name, seed) not in held:
                    yield method, task, seed


def measure(server: Server, method: str, task: RealTask, seed: int, num_threads: int, console: Console) -> Cell:
    """Train, if the method is trained, and evaluate."""
    if method not in METHODS:
        return _asked_of(server, method, task, seed, None)
    recipe = replace(METHODS[method], task=task, seed=seed)
    with tempfile.TemporaryDirectory() as scratch, Client(server.address) as client:
        with ProgressBar(console, f"{method} on {task.name}, seed {seed}") as bar:
            trained = train_recipe(recipe, Path(scratch, "made"), num_threads=num_threads, progress=bar)
        client.upload("studied", Path(scratch, "made"))
        cell = _asked_of(server, method, task, seed, "studied")
        client.unregister("studied")
    return replace(cell, num_parameters=trained.num_parameters, num_steps=_NUM_STEPS, train_s=round(trained.seconds, 1))


def _asked_of(server: Server, method: str, task: RealTask, seed: int, adapter: str | None) -> Cell:
    """Evaluate, without the fields that describe the training."""
    examples = task.examples(NUM_EXAMPLES, _EVALUATION_SEED, Split.TEST)
    texts = [one.input for one in examples]
    turns = task.prompted(texts) if method == PROMPTED else [asked(text) for text in texts]
    given = answers(server.address, [Ask(one, adapter, task.max_new_tokens) for one in turns])
    found = score(task, examples, given)
    return Cell(method=method, task=task.name, seed=seed, exact=found.exact, f1=found.f1)


def cells(known: Sequence[Cell]) -> list[list[str]]:
    """Return the table's cells, header first: exact match with its standard deviation over seeds, and fields' F1."""
    body = []
    for method in (BASE, PROMPTED, *METHODS):
        own = [cell for cell in known if cell.method == method]
        if not own:
            continue
        count = max(cell.num_parameters for cell in own)
        by_task = ([cell for cell in own if cell.task == task] for task in TASKS)
        body.append([method, f"{count:,}" if count else "", *(_shown(of_task) for of_task in by_task)])
    return [["method", "parameters", *(f"{task.description}: exact, F1" for task in TASKS.values())], *body]


def _shown(of_task: Sequence[Cell]) -> str:
    if not of_task:
        return ""
    exact = [100 * cell.exact for cell in of_task]
    spread = f" ± {statistics.stdev(exact):.0f}" if len(exact) > 1 else ""
    return f"{statistics.mean(exact):.0f} %{spread}, {statistics.mean(cell.f1 for cell in of_task):.2f}"


def read(results: Path) -> list[Cell]:
    """Return what was measured; an empty list if the file does not exist."""
    return [Cell(**one) for one in json.loads(results.read_text())] if results.exists() else []


def main(
    results: Annotated[Path, typer.Option(help="JSON file of the measurements.")] = RESULTS,
    only: Annotated[list[str] | None, typer.Option(help="Measure only this method; may be repeated.")] = None,
    num_threads: Annotated[int, typer.Option(help="CPU threads of the training; 0 for all cores.")] = 0,
    markdown_file: Annotated[Path | None, document.option(_MARKER)] = None,
) -> None:
    """Train and measure what is missing; an interrupted study resumes at the same cell."""
    console, known = Console(), read(results)
    methods = chosen(only, (BASE, PROMPTED, *METHODS))
    wanted = [one for one in missing(known) if one[0] in methods]
    results.parent.mkdir(parents=True, exist_ok=True)
    if wanted:
        with (
            tempfile.TemporaryDirectory() as scratch,
            serving(console, model.path(), [], Path(scratch), quantization="none") as server,
        ):
            for index, (method, task, seed) in enumerate(wanted, start=1):
                cell = measure(server, method, task, seed, num_threads, console)
                known.append(cell)
                results.write_text(json.dumps([asdict(one) for one in known], indent=1) + "\n")
                console.print(f"{index} of {len(wanted)}: {method} on {task.name}, seed {seed}: {_shown([cell])}")
    title = f"{NUM_EXAMPLES} unseen inputs, SmolLM2-135M-Instruct, unquantized"
    document.publish(title, cells(known), markdown_file, _MARKER)


if __name__ == "__main__":
    typer.run(main)
