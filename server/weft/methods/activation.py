"""Adapters that act only from an invocation on, called activated (Greenewald et al. 2025, arXiv:2504.12397, section 3).

    gate[t] = 1  from the first token of the last occurrence of the invocation tokens in the prompt on
              0  before it, and everywhere if the prompt does not hold them

The keys and values before the invocation are therefore the base's own, and any number of such adapters share them. PEFT
has the same rule (`alora_invocation_tokens`). Deviation: generated tokens never move the beginning, in PEFT as here,
since only the prompt is searched.
"""

from collections.abc import Sequence


def begin(invocation: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return the index of the last occurrence of `invocation`, which is not empty, in `tokens`; None if there is none.

    The search is Knuth, Morris and Pratt's, from the end: linear in the tokens, however an invocation repeats itself.
    """
    wanted = tuple(reversed(invocation))
    borders = _borders(wanted)
    matched = 0
    for first in range(len(tokens) - 1, -1, -1):
        while matched and tokens[first] != wanted[matched]:
            matched = borders[matched - 1]
        if tokens[first] == wanted[matched]:
            matched += 1
        if matched == len(wanted):
            return first
    return None


def _borders(wanted: Sequence[int]) -> list[int]:
    """Compute KMP's failure function: for each prefix, the length of its longest proper prefix that is a suffix."""
    borders = [0]
    for token in wanted[1:]:
        length = borders[-1]
        while length and token != wanted[length]:
            length = borders[length - 1]
        borders.append(length + (token == wanted[length]))
    return borders
