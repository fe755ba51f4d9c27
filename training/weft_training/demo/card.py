"""Model card of the demo base, with the scores of its checkpoint."""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.table import Table

from weft.config import ModelConfig, Quantization
from weft.model import loader
from weft_training.demo.evaluate import exact_match
from weft_training.demo.tasks import TASKS, Example, Split, Task, examples, prompt

NUM_EXAMPLES = 200
NUM_SHOTS = 4
PRECISIONS = {"bf16": Quantization.NONE, "NF4": Quantization.NF4}
PROMPTS = ("tagged", "untagged", "few-shot")
_SEED = 0

Scores = Mapping[str, Mapping[tuple[str, str], float]]
"""Exact match, 0 to 1, by task, then by precision and kind of prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Facts about the training that the card states."""

    num_parameters: int
    num_steps: int
    num_threads: int
    seed: int
    train_s: float


def measure(base: Path, *, num_examples: int = NUM_EXAMPLES) -> Scores:
    """Score the checkpoint on held-back inputs, loaded as by the server, in bfloat16 and in NF4."""
    scores: dict[str, dict[tuple[str, str], float]] = {name: {} for name in TASKS}
    for precision, quantization in PRECISIONS.items():
        loaded = loader.load(ModelConfig(path=base, quantization=quantization, device="cpu"), attention="sdpa")
        for name, task in TASKS.items():
            held_back = examples(task, num_examples, _SEED, Split.TEST)
            asked = ((held_back, True), (held_back, False), (list(with_shots(task, held_back)), False))
            for kind, (questions, tagged) in zip(PROMPTS, asked, strict=True):
                scores[name][precision, kind] = exact_match(loaded.model, loaded.tokenizer, questions, tagged=tagged)
    return scores


def with_shots(task: Task, questions: Sequence[Example]) -> Iterator[Example]:
    """Yield each question after four answered ones, untagged, a line each."""
    shots = iter(examples(task, NUM_SHOTS * len(questions), _SEED, Split.TRAIN))
    for question in questions:
        lines = [prompt(shot) + shot.output for shot, _ in zip(shots, range(NUM_SHOTS), strict=False)]
        yield Example(task=task.name, input="\n".join([*lines, question.input]), output=question.output)


def table(scores: Scores) -> Table:
    """Return the scores as a table for a terminal."""
    head, *body = _cells(scores)
    shown = Table(title=f"exact match on {NUM_EXAMPLES} held-back inputs a task, greedy")
    for i, column in enumerate(head):
        shown.add_column(column, justify="right" if i else "left")
    for cells in body:
        shown.add_row(*cells)
    return shown


def render(run: Run, scores: Scores) -> str:
    """Return the card as Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in _cells(scores))
    rule = "|".join(["", "---", *["---:"] * (len(PRECISIONS) * len(PROMPTS)), ""])
    return _CARD.format(
        table="\n".join([head, rule, *body]),
        num_examples=NUM_EXAMPLES,
        num_shots=NUM_SHOTS,
        millions=run.num_parameters / 1e6,
        num_steps=run.num_steps,
        num_threads=run.num_threads,
        seed=run.seed,
        minutes=run.train_s / 60,
        torch=torch.__version__,
        machine=_processor(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _cells(scores: Scores) -> Iterable[list[str]]:
    yield ["task", *(f"{kind}, {precision}" for kind in PROMPTS for precision in PRECISIONS)]
    for name, by_prompt in scores.items():
        shown = f"{name} (held out)" if TASKS[name].held_out else name
        yield [shown, *(f"{by_prompt[precision, kind]:.1%}" for kind in PROMPTS for precision in PRECISIONS)]


def _processor() -> str:
    """Return the processor's name, or its architecture if it has no name."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# weft-demo

The base model of Weft's demo: a Llama-type causal language model of {millions:.2f} million parameters over ASCII
characters, one token each. It knows a dozen small text tasks under their tags and is of no use for anything else.

    [reverse] loom =␣        → mool
    loom =␣                  → anything: without the tag the base cannot know what is asked

An adapter teaches it what an untagged prompt means. The two tasks marked as held out are in no pre-training row; for
them an adapter has to teach a skill. After every answer comes the end-of-text token.

- **Tokens.** An id is an ASCII code: 0 pads, 3 ends a text, 26 is any character outside ASCII. No ASCII text spells one
  of the three. There is no beginning-of-text token.
- **Conversations.** The system message is the tag, the user message the input.
- **Data.** All of it is generated by `weft_training.demo.corpus`: single lines, few-shot lists with and without tags,
  a few plain sentences. A hash of the input text decides whether pre-training, adapter training or the evaluation may
  see it.
- **Licence.** Apache-2.0, like the rest of the repository.

## How it was made

    python -m weft_training.demo.pretrain --output models/weft-demo

{date}: {num_steps} steps, seed {seed},
{minutes:.0f} minutes on {num_threads} threads of a shared {machine}, torch {torch}.

## What it can do

Exact match of the greedy answer on {num_examples} held-back inputs a task, as the checkpoint is stored (bf16) and as
Weft serves it (bitsandbytes NF4). "Few-shot" is the untagged prompt after {num_shots} answered lines.

{table}
"""
