"""Building blocks of the real demo's texts: names of people from `faker`, and wordings, each owned by one split.

An evaluation shares no name, item or wording with an adapter's training: a wording is in one of two lists, and first
and last names are each assigned to a split by their hash.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from faker import Faker

from weft_training.demo.tasks import Split

_LOCALES = ["en_GB", "en_US", "en_IN", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pl_PL", "sv_SE"]
_SHARE_OF_TEST = 4  # one name in so many
_TYPOS_OF = 40  # one word in so many
_ASKING = ("is ", "can ", "could ", "do ", "how ", "what ", "when ", "which ", "who ", "why ")
_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])")


class Wordings(NamedTuple):
    """Ways to say one thing: those for training and those for the evaluation."""

    train: Sequence[str]
    test: Sequence[str]

    def draw(self, rng: random.Random, split: Split) -> str:
        return rng.choice(self.train if split is Split.TRAIN else self.test)


def worded(*train: str, test: Sequence[str]) -> Wordings:
    """Return the wordings of one thing."""
    return Wordings(train, test)


class People:
    """Names from many countries. seed: of the draws."""

    def __init__(self, seed: int, split: Split) -> None:
        self._faker = Faker(_LOCALES)
        self._faker.seed_instance(seed)
        self._split = split

    def first(self) -> str:
        """Return a first name of the split."""
        return self._own(self._faker.first_name)

    def last(self) -> str:
        """Return a last name of the split."""
        return self._own(self._faker.last_name)

    def full(self) -> str:
        return f"{self.first()} {self.last()}"

    def _own(self, draw: Callable[[], str]) -> str:
        while True:
            name = draw()
            if split_of(name) is self._split:
                return name


def split_of(name: str) -> Split:
    """Return the split that owns a name."""
    return Split.TEST if zlib.crc32(name.encode()) % _SHARE_OF_TEST == 0 else Split.TRAIN


def sentence(text: str) -> str:
    """Make a clause a sentence: its capital, its full stop, and "an" before a vowel."""
    whole = text[0].upper() + text[1:] + ("?" if text.startswith(_ASKING) else ".")
    return _BEFORE_VOWEL.sub("an ", whole)


def mistyped(text: str, rng: random.Random, keep: Sequence[str]) -> str:
    """Swap two letters in a few words of the text, as hurried writers do; parts in `keep` stay as they are."""
    kept = {word for part in keep for word in part.split()}
    return " ".join(word if word.strip(".,!?") in kept else _swapped(word, rng) for word in text.split(" "))


def _swapped(word: str, rng: random.Random) -> str:
    if not word.isalpha() or len(word) < 5 or rng.randrange(_TYPOS_OF):
        return word
    at = rng.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
