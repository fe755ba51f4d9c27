"""Small text tasks, for the pre-training of the demo base and for the demo's adapters.

A line of a task is `[tag] input = output`. The base is trained on tagged lines, so it has the skills; the tag selects
one. The letter tasks share one distribution of inputs, so that a prompt without the tag is ambiguous; an adapter
resolves it. Tasks with `held_out` are in no pre-training row: their adapters must teach a skill and not only elicit
one.

The inputs of the three splits are disjoint by construction: the split of an input is a hash of its text, for every
task.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
FIELDS = ("name", "age", "city", "job", "team", "pet")

LETTERS_MIN, LETTERS_MAX = 3, 8


class Split(StrEnum):
    """Use of an input: the base's pre-training, an adapter's training, or only the evaluation."""

    PRETRAIN = "pretrain"
    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A text function and the distribution of its inputs.

    name: also the tag of its lines.
    function: the truth; total on what `sample` draws.
    held_out: kept out of pre-training altogether.
    """

    name: str
    function: Callable[[str], str]
    sample: Callable[[random.Random], str]
    held_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An input of a task and its only right answer."""

    task: str
    input: str
    output: str


def prompt(example: Example, *, tagged: bool = False) -> str:
    """Return the text up to the answer. Adapters are trained and served untagged; only the base needs the tag."""
    tag = f"[{example.task}] " if tagged else ""
    return f"{tag}{example.input} = "


def split_of(text: str) -> Split:
    """Return the split that owns an input: half of all inputs are for pre-training, three tenths for adapters."""
    bucket = hashlib.blake2b(text.encode(), digest_size=2).digest()
    share = int.from_bytes(bucket, "big") / 0x10000
    if share < 0.5:
        return Split.PRETRAIN
    return Split.TRAIN if share < 0.8 else Split.TEST


def stream(task: Task, rng: random.Random, split: Split | str) -> Iterator[Example]:
    """Yield examples of one split without end; inputs may repeat."""
    split = Split(split)
    if task.held_out and split is Split.PRETRAIN:
        raise ValueError(f"task {task.name!r} is held out of pre-training")
    while True:
        text = task.sample(rng)
        if split_of(text) is split:
            yield Example(task=task.name, input=text, output=task.function(text))


def examples(task: Task, count: int, seed: int, split: Split | str) -> list[Example]:
    """Return `count` examples with distinct inputs, the same for the same arguments on every machine.

    The task does not affect the seed: tasks with one distribution get the same inputs, so that their adapters can be
    compared prompt by prompt.
    """
    rng = random.Random(f"{split}/{seed}")  # noqa: S311  reproducible, not secret
    return distinct(stream(task, rng, split), count, task.name, split, draws_max=count * 1_000)


def distinct(drawn: Iterator[Example], count: int, task: str, split: Split | str, *, draws_max: int) -> list[Example]:
    """Return the first `count` examples with distinct inputs. Raises ValueError if too few are in `draws_max` draws."""
    found: dict[str, Example] = {}
    for example in itertools.islice(drawn, draws_max):
        found.setdefault(example.input, example)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"task {task!r} has only about {len(found)} inputs in split {split}, asked for {count}")


# --- inputs ---------------------------------------------------------------------------------------------------------


def sample_letters(rng: random.Random) -> str:
    """Return a lower-case string of 3 to 8 letters with a vowel and a consonant; half of them are easy to pronounce."""
    while True:
        length = rng.randint(LETTERS_MIN, LETTERS_MAX)
        if rng.random() < 0.5:
            text = "".join(rng.choices(LETTERS, k=length))
        else:
            phase = rng.randrange(2)
            text = "".join(rng.choice(VOWELS if (i + phase) % 2 else CONSONANTS) for i in range(length))
        if any(c in VOWELS for c in text) and any(c in CONSONANTS for c in text):
            return text


def sample_digits(rng: random.Random) -> str:
    """Return 3 to 8 digits."""
    return "".join(rng.choices(DIGITS, k=rng.randint(3, 8)))


def sample_record(rng: random.Random) -> str:
    """Return a record `name=tom;age=31;city=rome|age`: three fields and the one to extract."""
    keys = rng.sample(FIELDS, 3)
    values = [
        str(rng.randint(10, 99)) if key == "age" else "".join(rng.choices(LETTERS, k=rng.randint(3, 5))) for key in keys
    ]
    fields = ";".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return f"{fields}|{rng.choice(keys)}"


def sample_date(rng: random.Random) -> str:
    """Return a date `7 march 2021`: a day that every month has, 1900 to 2099."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1900, 2099)}"


def sample_sum(rng: random.Random) -> str:
    """Return a sum `17+25` of two numbers below a hundred."""
    return f"{rng.randrange(100)}+{rng.randrange(100)}"


# --- functions ------------------------------------------------------------------------------------------------------


def caesar(text: str) -> str:
    """Replace each letter by the next one, and z by a."""
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)


def field(text: str) -> str:
    """Return the value of the field named after the bar."""
    record, _, wanted = text.partition("|")
    return dict(pair.split("=") for pair in record.split(";"))[wanted]


def iso_date(text: str) -> str:
    """Return the date in ISO 8601."""
    day, month, year = text.split()
    return f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"


def _sorted(text: str) -> str:
    return "".join(sorted(text))


def _zigzag(text: str) -> str:
    return "".join(c.upper() if i % 2 == 0 else c for i, c in enumerate(text))


def _on_letters(name: str, function: Callable[[str], str], *, held_out: bool = False) -> Task:
    return Task(name=name, function=function, sample=sample_letters, held_out=held_out)


_ALL = (
    _on_letters("reverse", lambda text: text[::-1]),
    _on_letters("upper", str.upper),
    _on_letters("caesar", caesar),
    _on_letters("double", lambda text: "".join(c + c for c in text)),
    _on_letters("sort", _sorted),
    _on_letters("rotate", lambda text: text[1:] + text[0]),
    _on_letters("stars", lambda text: "".join("*" if c in VOWELS else c for c in text)),
    _on_letters("devowel", lambda text: "".join(c for c in text if c not in VOWELS)),
    _on_letters("length", lambda text: str(len(text))),
    Task(name="digits", function=_sorted, sample=sample_digits),
    Task(name="field", function=field, sample=sample_record),
    Task(name="date", function=iso_date, sample=sample_date),
    Task(name="sum", function=lambda text: str(sum(map(int, text.split("+")))), sample=sample_sum),
    _on_letters("swap", lambda text: text[-1] + text[1:-1] + text[0], held_out=True),
    _on_letters("zigzag", _zigzag, held_out=True),
)

TASKS = MappingProxyType({task.name: task for task in _ALL})
