"""Eight adapters trained together against one after the other, on the demo base: `python -m benchmarks.joint_training`.

Both ways write the same directories from the same configs; runs alternate, and medians count. Seconds are of the loops,
without loading the base, which the separate runs do eight times.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from weft.config import ModelConfig
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.protocol import MethodConfig
from weft_training.adapter import USUAL
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.demo.document import table
from weft_training.demo.tasks import TASKS, Split, examples, prompt
from weft_training.joint import train_many
from weft_training.shipped import BASE
from weft_training.trainer import train

_LORA = LoraConfig(rank=8, target_modules=("q_proj", "v_proj", "down_proj"))
MIXES: dict[str, Sequence[MethodConfig]] = {
    "8 lora": (_LORA,) * 8,
    "8 ia3": (USUAL["ia3"],) * 8,
    "3 lora, 3 ia3, 2 prefix": (*(_LORA,) * 3, *(USUAL["ia3"],) * 3, *(PrefixConfig(num_virtual_tokens=8),) * 2),
}
_TASKS = ("reverse", "upper", "caesar", "zigzag", "rotate", "stars", "swap", "double")


def main(
    batch_size: Annotated[list[int] | None, typer.Option(help="Examples of an adapter's step.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each adapter.")] = 20,
    repeats: Annotated[int, typer.Option(help="Alternating runs of each way.")] = 3,
    mix: Annotated[list[str] | None, typer.Option(help="Which mixes; all if none is named.")] = None,
) -> None:
    """Print a table of both ways."""
    drawn = [examples(TASKS[task], 400, 0, Split.TRAIN) for task in _TASKS]
    learned = [[Example(prompt(one), one.output) for one in of_task] for of_task in drawn]
    cells: list[list[str]] = [["adapters", "batch size", "apart, ms a step", "together, ms a step", "gain"]]
    for name in mix or MIXES:
        for size in batch_size or (4, 8, 16):
            one, other = _measure(MIXES[name], size, learned, steps, repeats)
            cells.append([name, str(size), f"{one:.0f}", f"{other:.0f}", f"{one / other:.2f} ×"])
            print(*cells[-1], sep="  ", file=sys.stderr, flush=True)
    console = Console()
    console.print(table("eight adapters, apart and together", cells))
    told = report.conditions("transformers", "bitsandbytes")
    console.print(report.line(told) + f", median of {repeats} turns", highlight=False, soft_wrap=True)


def _measure(
    methods: Sequence[MethodConfig], size: int, learned: Sequence[Sequence[Example]], steps: int, repeats: int
) -> tuple[float, float]:
    """Return milliseconds for a step of all adapters: one after the other, and together."""
    with tempfile.TemporaryDirectory() as scratch:
        configs = [
            TrainConfig(
                model=ModelConfig(path=BASE, device="cpu"),
                adapter=method,
                output=Path(scratch, str(place)),
                num_steps=steps,
                batch_size=size,
                learning_rate=5e-3,
                overwrite=True,
            )
            for place, method in enumerate(methods)
        ]
        joint = [replace(one, output=Path(scratch, f"joint-{place}")) for place, one in enumerate(configs)]
        apart, together = [], []
        for _ in range(repeats):
            runs = [train(one, examples=own) for one, own in zip(configs, learned, strict=True)]
            apart.append(sum(run.seconds for run in runs))
            together.append(max(run.seconds for run in train_many(joint, examples=learned)))
    return statistics.median(apart) / steps * 1e3, statistics.median(together) / steps * 1e3


if __name__ == "__main__":
    typer.run(main)
