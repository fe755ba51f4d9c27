"""Every method on every task of the demo base: `python -m weft_training.demo.study` trains, measures, plots.

All adapters of a method are trained with one recipe, on the NF4 base, from untagged prompts, and evaluated on unseen
inputs. A JSON file keeps the measurements, so that another run can continue with those that are missing.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from weft.config import ModelConfig
from weft.methods.bitfit.math import BitfitConfig
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.dora.math import DoraConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.prompt.math import PromptConfig
from weft.methods.protocol import MethodConfig
from weft.methods.ptuning.math import PtuningConfig
from weft.model import loader
from weft_training import adapter as adapters
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.base import num_parameters
from weft_training.demo import document
from weft_training.demo.adapters import Recipe, chosen, train_recipe
from weft_training.demo.evaluate import exact_match
from weft_training.demo.tasks import TASKS, Split, examples
from weft_training.shipped import BASE

RESULTS = Path("benchmarks/results/methods.json")
NUM_EXAMPLES = 200
EVALUATION_SEED = 2
UNTAGGED = "base, untagged"
_MARKER = "study"
_NUM_THREADS = 2

STUDIED: Sequence[str] = ("reverse", "upper", "caesar", "rotate", "swap", "zigzag")


def _recipe(adapter: MethodConfig, learning_rate: float, num_steps: int) -> Recipe:
    return Recipe(task="", adapter=adapter, learning_rate=learning_rate, num_steps=num_steps)


# The recipe of each method; its task is replaced.
_RECIPES: Mapping[str, Recipe] = {
    "lora": _recipe(LoraConfig(rank=8, alpha=16.0), 5e-3, 250),
    "rslora": _recipe(LoraConfig(rank=32, alpha=16.0, use_rslora=True), 2e-3, 250),
    "dora": _recipe(DoraConfig(rank=8, alpha=16.0), 5e-3, 250),
    "bottleneck, serial": _recipe(BottleneckConfig(size=16), 5e-3, 250),
    "bottleneck, parallel": _recipe(BottleneckConfig(form=Form.PARALLEL, size=16), 5e-3, 300),
    "bitfit": _recipe(BitfitConfig(), 5e-2, 600),
    "ia3": _recipe(USUAL["ia3"], 0.1, 600),
    "prefix": _recipe(PrefixConfig(num_virtual_tokens=16), 0.1, 300),
    "prefix, MLP": _recipe(PrefixConfig(num_virtual_tokens=16, prefix_projection=True), 3e-3, 300),
    "prompt": _recipe(PromptConfig(num_virtual_tokens=16), 3e-2, 300),
    "ptuning": _recipe(PtuningConfig(num_virtual_tokens=16), 3e-3, 300),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One adapter: its training's cost, and its exact match, 0 to 1."""

    method: str
    task: str
    num_parameters: int
    exact_match: float
    train_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Measurements by adapter.

    num_base_parameters: the base's, for the efficiency ratio. untagged: the base's own exact match, by task.
    """

    num_base_parameters: int
    untagged: Mapping[str, float]
    measured: Sequence[Measured]

    def of(self, method: str) -> dict[str, Measured]:
        """Return a method's measurements by task."""
        return {one.task: one for one in self.measured if one.method == method}


def study(
    methods: Iterable[str], tasks: Sequence[str], known: Study | None, console: Console, keep: Callable[[Study], None]
) -> Study:
    """Train and measure what `known` lacks; `keep` is called after each adapter."""
    base = loader.load(ModelConfig(path=BASE, num_threads=_NUM_THREADS), attention="sdpa")
    held_back = {task: examples(TASKS[task], NUM_EXAMPLES, EVALUATION_SEED, Split.TEST) for task in tasks}
    found = Study(
        num_base_parameters=num_parameters(base),
        untagged={task: exact_match(base.model, base.tokenizer, asked) for task, asked in held_back.items()},
        measured=() if known is None else known.measured,
    )
    wanted = [(method, task) for method in methods for task in tasks if task not in found.of(method)]
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as scratch:
        bar = progress.add_task("", total=len(wanted))
        for method, task in wanted:
            progress.update(bar, description=f"{method} on {task}")
            output = Path(scratch, str(len(found.measured)))
            result = train_recipe(replace(_RECIPES[method], task=task), output, num_threads=_NUM_THREADS)
            adapted = AdaptedModel(base, adapters.read(output, base.shape))
            measured = Measured(
                method=method,
                task=task,
                num_parameters=result.num_parameters,
                exact_match=exact_match(adapted, base.tokenizer, held_back[task]),
                train_s=result.seconds,
            )
            found = replace(found, measured=[*found.measured, measured])
            keep(found)
            progress.advance(bar)
    return found


def cells(found: Study) -> list[list[str]]:
    """Return the table's cells, header first: a row per method, a column per task."""
    tasks = list(found.untagged)
    names = [f"{task}*" if TASKS[task].held_out else task for task in tasks]
    untagged = [UNTAGGED, "", "", "", *(f"{found.untagged[task]:.0%}" for task in tasks)]
    rows = [["method", "parameters", "ratio", "seconds", *names], untagged]
    for method in dict.fromkeys(one.method for one in found.measured):
        by_task = found.of(method)
        count = max(one.num_parameters for one in by_task.values())
        seconds = sorted(one.train_s for one in by_task.values())[len(by_task) // 2]
        scores = (f"{by_task[task].exact_match:.0%}" if task in by_task else "" for task in tasks)
        ratio = f"{found.num_base_parameters / count:.0f}x"
        rows.append([method, f"{count:,}", ratio, f"{seconds:.0f}", *scores])
    return rows


def plot(found: Study, path: Path) -> None:
    """Plot mean exact match against trained parameters, for the tasks of pre-training and for the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names: dict[int, list[str]] = {}  # methods of one size share a label
    lowest = 1.0
    for method in dict.fromkeys(one.method for one in found.measured):
        of_method = list(found.of(method).values())
        count = of_method[0].num_parameters
        names.setdefault(count, []).append(method)
        for held_out, marker, color in ((False, "o", "C0"), (True, "x", "C3")):
            scores = [one.exact_match for one in of_method if TASKS[one.task].held_out is held_out]
            if scores:
                axes.plot(count, sum(scores) / len(scores), marker, color=color)
                lowest = min(lowest, sum(scores) / len(scores))
    for place, (count, methods) in enumerate(sorted(names.items())):
        axes.annotate("\n".join(methods), (count, 1.005 + 0.012 * (place % 2)), ha="center", va="bottom", fontsize=8)
    axes.plot([], [], "o", color="C0", label="tasks that the base knows under a tag")
    axes.plot([], [], "x", color="C3", label="tasks that it has never seen")
    bottom = int(lowest * 20) / 20 - 0.05
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"exact match (from {bottom:.0%})", ylim=(bottom, 1.05))
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 1])
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods to study; all if none is named.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = ",".join(STUDIED),
    results: Annotated[
        Path, typer.Option(help="JSON file of the measurements; those in it are not repeated.")
    ] = RESULTS,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Also draw parameters against accuracy here.")
    ] = None,
    markdown_file: Annotated[Path | None, document.option(_MARKER)] = None,
) -> None:
    """Train every method on every task of the demo base and measure it on held-back inputs."""
    wanted = chosen(methods, _RECIPES)
    console = Console()
    known = _read(results) if results.exists() else None
    results.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: Study) -> None:
        results.write_text(json.dumps(asdict(found), indent=1) + "\n")

    found = study(wanted, tasks.split(","), known, console, keep)
    title = f"exact match on {NUM_EXAMPLES} held-back inputs, NF4 base (* in no pre-training row)"
    document.publish(title, cells(found), markdown_file, _MARKER)
    if plot_file is not None:
        plot(found, plot_file)


def _read(path: Path) -> Study:
    held = json.loads(path.read_text())
    return Study(**{**held, "measured": [Measured(**one) for one in held["measured"]]})


if __name__ == "__main__":
    typer.run(main)
