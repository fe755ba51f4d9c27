"""What the real demo's texts are made of: names of people from `faker`, and wordings, each of them owned by one split.

An evaluation holds no name, no thing and no wording that an adapter was trained on: a wording stands in one of two
lists, and first and last names belong to a split by their hash, each on its own.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from faker import Faker

from weft_training.demo.tasks import Split

_LOCALES = ["en_GB", "en_US", "en_IN", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pl_PL", "sv_SE"]
_SHARE_OF_TEST = 4  # one name of so many
_TYPOS_OF = 40  # one word of so many
_ASKING = ("is ", "can ", "could ", "do ", "how ", "what ", "when ", "which ", "who ", "why ")
_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])")


class Wordings(NamedTuple):
    """Ways to say one thing: those that adapters are trained on, and those of the evaluation."""

    train: Sequence[str]
    test: Sequence[str]

    def draw(self, rng: random.Random, split: Split) -> str:
        return rng.choice(self.train if split is Split.TRAIN else self.test)


class People:
    """Names, drawn from many countries'. seed: of the draws."""

    def __init__(self, seed: int, split: Split) -> None:
        self._faker = Faker(_LOCALES)
        self._faker.seed_instance(seed)
        self._split = split

    def first(self) -> str:
        """A first name of the split."""
        return self._own(self._faker.first_name)

    def last(self) -> str:
        """A last name of the split."""
        return self._own(self._faker.last_name)

    def full(self) -> str:
        return f"{self.first()} {self.last()}"

    def _own(self, draw: Callable[[], str]) -> str:
        while True:
            name = draw()
            if split_of(name) is self._split:
                return name


def split_of(name: str) -> Split:
    """The split that owns a name."""
    return Split.TEST if zlib.crc32(name.encode()) % _SHARE_OF_TEST == 0 else Split.TRAIN


def sentence(text: str) -> str:
    """A clause as a sentence: its capital, its end, and "an" before a vowel."""
    whole = text[0].upper() + text[1:] + ("?" if text.startswith(_ASKING) else ".")
    return _BEFORE_VOWEL.sub("an ", whole)


def mistyped(text: str, rng: random.Random, keep: Sequence[str]) -> str:
    """The text with two letters of a few words swapped, as hurried people write; `keep` are parts left as they are."""
    kept = {word for part in keep for word in part.split()}
    return " ".join(word if word.strip(".,!?") in kept else _swapped(word, rng) for word in text.split(" "))


def _swapped(word: str, rng: random.Random) -> str:
    if not word.isalpha() or len(word) < 5 or rng.randrange(_TYPOS_OF):
        return word
    at = rng.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
