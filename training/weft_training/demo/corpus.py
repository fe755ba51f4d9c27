"""Pre-training rows of the demo base: lines of tasks, alone and as few-shot lists, and plain sentences.

A row is a text with a target for each character. Answers and sentences are learned; inputs are not, since they are
noise. After every answer the target is the end-of-text token, even if the row continues with another line, so that a
prompt with any number of examples gets one answer and then the end.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from weft_training.demo.tasks import TASKS, Example, Split, prompt, stream
from weft_training.demo.tokenizer import EOS, PAD

ARTICLES = ("the", "a", "one", "every", "my", "her", "that")
ADJECTIVES = ("old", "quiet", "red", "small", "bright", "cold", "slow", "young", "heavy", "kind")
NOUNS = ("weaver", "loom", "river", "miller", "boat", "thread", "horse", "garden", "lamp", "fox", "door", "teacher")
VERBS = ("finds", "mends", "sees", "carries", "paints", "follows", "leaves", "remembers", "holds", "hears")
PLACES = ("near the bridge", "in the rain", "at night", "by the window", "after lunch", "behind the mill", "on sunday")

PROSE_SHARE = 0.05
SINGLE_TASK_SHARE = 0.6  # of the rows with tasks; in the others every line has another task
UNTAGGED_SHARE = 0.15  # of the single-task rows; enough for untagged prompts to be familiar, and ambiguous
CONVERSATION_SHARE = 0.3  # of the rows with tasks: lines end as the chat template ends them
HARD_TASKS = {"sort": 3, "field": 3, "sum": 3, "digits": 2, "date": 2}  # how many times as often as the others


class Row(NamedTuple):
    """A text and its targets, of equal length; `PAD` in `targets` marks a character that is not learned."""

    text: str
    targets: str


def rows(rng: random.Random, *, length: int) -> Iterator[Row]:
    """Yield pre-training rows of at most `length` characters, without end."""
    sources = {name: stream(task, rng, Split.PRETRAIN) for name, task in TASKS.items() if not task.held_out}
    names = list(sources)
    weights = [HARD_TASKS.get(name, 1) for name in names]

    def mixed_lines() -> Iterator[Example]:
        while True:
            yield next(sources[rng.choices(names, weights)[0]])

    while True:
        if rng.random() < PROSE_SHARE:
            yield prose(rng, length=length)
            continue
        line_end = EOS + "\n" if rng.random() < CONVERSATION_SHARE else "\n"
        if rng.random() >= SINGLE_TASK_SHARE:
            yield listing(mixed_lines(), length=length, tagged=True, line_end=line_end)
        elif rng.random() >= UNTAGGED_SHARE:
            lines = sources[rng.choices(names, weights)[0]]
            yield listing(lines, length=length, tagged=True, line_end=line_end)
        else:  # all tasks equally often: the base must not prefer one
            yield listing(sources[rng.choice(names)], length=length, tagged=False, line_end=line_end)


def listing(lines: Iterator[Example], *, length: int, tagged: bool, line_end: str) -> Row:
    """Return as many lines of tasks as fit, at least one, each answered and ended."""
    text, targets = "", ""
    for example in lines:
        question = prompt(example, tagged=tagged)
        between = line_end if text else ""
        if text and len(text) + len(between) + len(question) + len(example.output) + 1 > length:
            break
        # The target at a line's end is always EOS.
        targets += (EOS + PAD * (len(between) - 1) if between else "") + PAD * len(question) + example.output
        text += between + question + example.output
    return Row(text + EOS, targets + EOS)


def prose(rng: random.Random, *, length: int) -> Row:
    """Return sentences, all of them learned."""
    text = sentence(rng)
    while len(more := f"{text} {sentence(rng)}") < length:
        text = more
    return Row(text + EOS, text + EOS)


def sentence(rng: random.Random) -> str:
    """Return one of about three million plain sentences."""
    subject, target = (f"{rng.choice(ARTICLES)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"{subject} {rng.choice(VERBS)} {target} {rng.choice(PLACES)}."
