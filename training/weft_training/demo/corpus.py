"""The pre-training rows of the demo base: lines of tasks, alone and as few-shot lists, and plain sentences.

A row is a text and, character by character, what is to be learned there. Answers and sentences are; inputs are not,
since they are noise. After every answer the target is the end-of-text token, also where the row goes on with another
line: so a prompt of any number of examples is answered once and then ended.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from weft_training.demo.tasks import TASKS, Example, Split, Task, prompt, stream
from weft_training.demo.tokenizer import EOS, PAD

ARTICLES = ("the", "a", "one", "every", "my", "her", "that")
ADJECTIVES = ("old", "quiet", "red", "small", "bright", "cold", "slow", "young", "heavy", "kind")
NOUNS = ("weaver", "loom", "river", "miller", "boat", "thread", "horse", "garden", "lamp", "fox", "door", "teacher")
VERBS = ("finds", "mends", "sees", "carries", "paints", "follows", "leaves", "remembers", "holds", "hears")
PLACES = ("near the bridge", "in the rain", "at night", "by the window", "after lunch", "behind the mill", "on sunday")

UNTAGGED_SHARE = 0.15  # of the single-task rows; enough that an untagged prompt is known, and ambiguous
SINGLE_TASK_SHARE = 0.6  # of the task rows; the others change the task with every line
PROSE_SHARE = 0.05
HARD_TASKS = ("sort", "digits", "count", "field", "sum")  # drawn three times as often as the others
CONVERSATION_SHARE = 0.3  # of the task rows: lines end as the chat template ends them


class Row(NamedTuple):
    """A text and its targets, of equal length; `PAD` in `targets` is a character that is not learned."""

    text: str
    targets: str


def rows(rng: random.Random, *, length: int) -> Iterator[Row]:
    """Pre-training rows of at most `length` characters, for ever."""
    sources = {name: stream(task, rng, Split.PRETRAIN) for name, task in TASKS.items() if not task.held_out}
    tasks = [TASKS[name] for name in sources for _ in range(3 if name in HARD_TASKS else 1)]
    while True:
        if rng.random() < PROSE_SHARE:
            yield prose(rng, length=length)
            continue
        single: Task | None = rng.choice(tasks) if rng.random() < SINGLE_TASK_SHARE else None
        tagged = single is None or rng.random() >= UNTAGGED_SHARE
        line_end = EOS + "\n" if rng.random() < CONVERSATION_SHARE else "\n"
        lines = (next(sources[(single or rng.choice(tasks)).name]) for _ in iter(int, 1))
        yield listing(lines, length=length, tagged=tagged, line_end=line_end)


def listing(lines: Iterator[Example], *, length: int, tagged: bool, line_end: str) -> Row:
    """As many lines of tasks as fit, at least one, each answered and ended."""
    text, targets = "", ""
    for example in lines:
        question = prompt(example, tagged=tagged)
        between = line_end if text else ""
        if text and len(text) + len(between) + len(question) + len(example.output) + 1 > length:
            break
        # The target of a line's end is EOS whatever stands there.
        targets += (EOS + PAD * (len(between) - 1) if between else "") + PAD * len(question) + example.output
        text += between + question + example.output
    return Row(text + EOS, targets + EOS)


def prose(rng: random.Random, *, length: int) -> Row:
    """Sentences, all of them learned."""
    text = sentence(rng)
    while len(more := f"{text} {sentence(rng)}") < length:
        text = more
    return Row(text + EOS, text + EOS)


def sentence(rng: random.Random) -> str:
    """One of about three million plain sentences."""
    subject, target = (f"{rng.choice(ARTICLES)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"{subject} {rng.choice(VERBS)} {target} {rng.choice(PLACES)}."
