"""The ranges of a request in which an adapter acts: half-open, of real token indices, in order, none touching the next.

    gate[t, k] = weight of k if t is in the ranges of k, 0 otherwise

Prompt and generated tokens count alike; virtual positions do not count. No ranges at all mean every token.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OPEN = 2**31 - 1  # an end after every token


class TokenRange(NamedTuple):
    """Tokens `begin` to `end` - 1."""

    begin: int
    end: int


Ranges = tuple[TokenRange, ...]


def normal(ranges: Iterable[TokenRange]) -> Ranges:
    """Return the canonical form of ordered, disjoint ranges: touching ranges become one, and all tokens are ()."""
    merged: list[TokenRange] = []
    for one in ranges:
        if merged and merged[-1].end == one.begin:
            one = TokenRange(merged.pop().begin, one.end)
        merged.append(one)
    return () if merged == [TokenRange(0, OPEN)] else tuple(merged)


def clip(ranges: Iterable[TokenRange], begin: int, end: int = OPEN) -> list[TokenRange]:
    """Return the parts of some ranges that lie in begin : end. Here, no ranges mean no tokens."""
    return [
        TokenRange(max(one.begin, begin), min(one.end, end)) for one in ranges if one.begin < end and begin < one.end
    ]


def runs(of: Sequence[Ranges], begin: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut begin : end wherever a range begins or ends: yield (first, one past the last, which of `of` act there).

    The work is per range, not per token.
    """
    edges = {begin, end, *(edge for ranges in of for one in ranges for edge in one if begin < edge < end)}
    for first, last in itertools.pairwise(sorted(edges)):
        yield first, last, [k for k, ranges in enumerate(of) if not ranges or clip(ranges, first, last)]
