"""Prompts that name the task in words: `right-to-left: loom = `.

The base was trained on tags (`[reverse] loom = `) and lists of examples. No row of its pre-training asks in words, so
it does not follow these cues. A router has only them to choose by if no request names an adapter.
"""

from collections.abc import Mapping, Sequence

from weft_training.demo.tasks import TASKS, Example, Split, examples, prompt

CUES: Mapping[str, Sequence[str]] = {
    "reverse": ("please turn around", "right-to-left", "from the last to the first"),
    "upper": ("please SHOUT", "in CAPITALS", "as LOUD as you can"),
    "caesar": ("please encode (+1)", "one further (z: a)", "as spies write (+1)"),
    "zigzag": ("please zig/zag", "up/down/up/down", "a saw's teeth /\\/\\"),
}


def cued(example: Example, cue: str) -> str:
    """Return the text up to the answer."""
    return f"{cue}: {prompt(example)}"


def cued_examples(task: str, count: int, seed: int, split: Split) -> Sequence[tuple[str, Example]]:
    """Return `count` prompts, each with its example; the task's cues take turns, inputs are distinct, of one split."""
    drawn = examples(TASKS[task], count, seed, split)
    return [(cued(one, CUES[task][index % len(CUES[task])]), one) for index, one in enumerate(drawn)]
