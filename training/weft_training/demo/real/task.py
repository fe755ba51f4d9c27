"""Real tasks: input texts, the one right answer to each, and how near another answer comes to it."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weft_training.data import Conversation
from weft_training.demo.real.wording import People
from weft_training.demo.tasks import Example, Split, distinct

Fields = Mapping[str, str]
Draw = Callable[[random.Random, People, Split], tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RealTask:
    """A task on texts.

    instruction: of a good prompt; adapters are trained and prompted without it.
    num_shots: solved inputs that a good prompt shows, from the training split.
    draw: makes an input and its right answer.
    fields: what an answer states, by name; empty if it does not have the required form.
    max_new_tokens: room for the longest right answer.
    """

    name: str
    description: str
    instruction: str
    num_shots: int
    draw: Draw
    fields: Callable[[str], Fields]
    max_new_tokens: int

    def examples(self, count: int, seed: int, split: Split) -> list[Example]:
        """Return `count` examples with distinct inputs, the same for the same arguments on every machine."""
        rng = random.Random(f"{self.name}/{split}/{seed}")  # noqa: S311  reproducible, not secret
        people = People(rng.randrange(1 << 32), split)
        pairs = (self.draw(rng, people, split) for _ in itertools.count())
        drawn = (Example(task=self.name, input=text, output=answer) for text, answer in pairs)
        return distinct(drawn, count, self.name, split, draws_max=count * 50)

    def prompted(self, texts: Sequence[str]) -> list[list[Mapping[str, str]]]:
        """Return good prompts, one a text: the instruction, the same solved inputs for all, and the text."""
        turns: list[Mapping[str, str]] = [{"role": "system", "content": self.instruction}]
        for shot in self.examples(self.num_shots, 99, Split.TRAIN):
            turns += conversation(shot).messages
        return [[*turns, *asked(text)] for text in texts]


def asked(text: str) -> list[dict[str, str]]:
    """Return the text alone, as a prompt for an adapter."""
    return [{"role": "user", "content": text}]


def conversation(example: Example) -> Conversation:
    """Return an example as an adapter's training conversation."""
    return Conversation((*asked(example.input), {"role": "assistant", "content": example.output}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of a task's answers, 0 to 1. exact: equal to the right answer. f1: of its fields, micro-averaged."""

    exact: float
    f1: float


def score(task: RealTask, examples: Sequence[Example], answers: Sequence[str]) -> Score:
    """Score the answers to the examples."""
    stripped = [answer.strip() for answer in answers]
    exact = sum(answer == one.output for answer, one in zip(stripped, examples, strict=True))
    hits = given = wanted = 0
    for answer, one in zip(stripped, examples, strict=True):
        found, right = task.fields(answer), task.fields(one.output)
        hits += sum(found.get(name) == value for name, value in right.items())
        given += len(found)
        wanted += len(right)
    return Score(exact=exact / len(examples), f1=2 * hits / (given + wanted))
