"""Exact match on the demo's tasks: the greedy answer equals the expected one, character by character.

`python -m weft_training.demo.evaluate` compares the demo's adapters with their base, on inputs that occur in neither
pre-training nor any adapter's training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weft.config import ModelConfig
from weft.methods.catalog import METHODS
from weft.model import loader
from weft_training import adapter
from weft_training.adapter import AdaptedModel
from weft_training.demo import document
from weft_training.demo.tasks import TASKS, Example, Split, examples, prompt
from weft_training.shipped import ADAPTERS, BASE

EVALUATION_SEED = 1
UNTAGGED, TAGGED = "base", "base, tagged"  # columns of the table; the others are methods
_MARKER = "evaluation"


class Generator(Protocol):
    """A causal language model: transformers', or one with an adapter."""

    @property
    def device(self) -> torch.device: ...

    def generate(self, *args: Any, **options: Any) -> Any: ...


@torch.inference_mode()
def answers(
    model: Generator, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 20
) -> list[str]:
    """Return the greedy continuation of each prompt up to the end-of-text token, in one padded batch."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    generated: Tensor = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)  # [B, P + N]
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(
    model: Generator, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, tagged: bool = False
) -> float:
    """Return the share of the examples answered exactly, 0 to 1."""
    found = answers(model, tokenizer, [prompt(example, tagged=tagged) for example in examples])
    right = sum(answer == example.output for answer, example in zip(found, examples, strict=True))
    return right / len(examples)


def measure(
    base_path: Path = BASE, adapters_path: Path = ADAPTERS, *, num_examples: int = 200
) -> dict[str, dict[str, float]]:
    """Return exact match by task, then by column: for the NF4 base and for every adapter `<task>-<method>` found."""
    base = loader.load(ModelConfig(path=base_path), attention="sdpa")
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(adapters_path.iterdir()):
        task, _, method = path.name.rpartition("-")
        if task not in TASKS or method not in METHODS:
            raise ValueError(f"adapters: must be called <task>-<method>, given {path.name!r}")
        held_back = examples(TASKS[task], num_examples, EVALUATION_SEED, Split.TEST)
        if task not in scores:
            scores[task] = {
                UNTAGGED: exact_match(base.model, base.tokenizer, held_back),
                TAGGED: exact_match(base.model, base.tokenizer, held_back, tagged=True),
            }
        adapted = AdaptedModel(base, adapter.read(path, base.shape))
        scores[task][method] = exact_match(adapted, base.tokenizer, held_back)
    return {task: scores[task] for task in TASKS if task in scores}


def rows(scores: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the table's cells, header first; a method without measurements has no column."""
    columns = [UNTAGGED, TAGGED, *(method for method in METHODS if any(method in cells for cells in scores.values()))]
    cells = [["task", *columns]]
    for task, found in scores.items():
        name = f"{task} (held out)" if TASKS[task].held_out else task
        cells.append([name, *(f"{found[column]:.0%}" if column in found else "" for column in columns)])
    return cells


def main(
    base: Annotated[Path, typer.Option(help="The demo base.")] = BASE,
    adapters: Annotated[Path, typer.Option(help="Directory of adapters called <task>-<method>.")] = ADAPTERS,
    num_examples: Annotated[int, typer.Option(help="Test inputs of each task.")] = 200,
    markdown_file: Annotated[Path | None, document.option(_MARKER)] = None,
) -> None:
    """Measure the demo's adapters: exact match in per cent on held-back inputs."""
    scores = measure(base, adapters, num_examples=num_examples)
    title = f"exact match, NF4 base, {num_examples} held-back inputs a task"
    document.publish(title, rows(scores), markdown_file, _MARKER)


if __name__ == "__main__":
    typer.run(main)
