"""The number of parameters that a method trains, as a formula that a reader can check."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Count(NamedTuple):
    """symbols: the formula, in the shape legend. numbers: the same with a base's sizes. total: its value."""

    symbols: str
    numbers: str
    total: int


class Term(NamedTuple):
    """One summand, usually one site's: "8·(256 + 64)" and 2560."""

    numbers: str
    total: int


def gather(symbols: str, terms: Iterable[Term]) -> Count:
    """Return the sum of `terms`; equal ones are written once: "4 × 8·(256 + 64) + 4 × 8·(256 + 512)"."""
    counted = Counter(terms)
    parts = [term.numbers if times == 1 else f"{times} × {term.numbers}" for term, times in counted.items()]
    return Count(symbols, " + ".join(parts) or "0", sum(term.total * times for term, times in counted.items()))
