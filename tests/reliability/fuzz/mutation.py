"""Seeded mutations, and the verdict on a reader: only its refusals may come out, and soon."""

import random
import time
from collections.abc import Iterator

from tests.reliability.fuzz.targets import Target

CASE_S_MAX = 1.0
_CHANGES_MAX = 6


class Failure(AssertionError):
    """A reader did not answer as it may; the text has the bytes that show it."""


def mutated(target: Target, *, seed: int) -> Iterator[bytes]:
    """Yield changed examples without end: with one to six changes each."""
    dice = random.Random(seed)
    while True:
        data = bytearray(dice.choice(target.examples))
        for _ in range(dice.randint(1, _CHANGES_MAX)):
            _change(data, dice)
        yield bytes(data)


def _change(data: bytearray, dice: random.Random) -> None:
    at, kind = dice.randint(0, len(data)), dice.random()
    if kind < 0.4 and at < len(data):
        data[at] = dice.randrange(256)
    elif kind < 0.6:
        data[at:at] = dice.randbytes(dice.randint(1, 4))
    elif kind < 0.8:
        del data[at : at + dice.randint(1, 8)]
    else:
        end = at + dice.randint(1, 40)
        data[end:end] = data[at:end]


def run(target: Target, data: bytes, *, case_s_max: float = CASE_S_MAX) -> bool:
    """Return whether `data` was accepted. Raises Failure for another error, or for one case that takes too long."""
    began = time.perf_counter()
    try:
        target.read(data)
        is_accepted = True
    except target.refusals:
        is_accepted = False
    except BaseException as error:
        raise Failure(f"{type(error).__name__}: {error}; of {data!r}") from error
    took_s = time.perf_counter() - began
    if took_s > case_s_max:
        raise Failure(f"took {took_s:.2f} s; of {data!r}")
    return is_accepted
