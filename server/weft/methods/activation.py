"""Activated adapters: those that act from an invocation on (Greenewald et al. 2025, arXiv:2504.12397, section 3).

    gate[t] = 1  from the first token of the last occurrence of the invocation tokens in the prompt on
              0  before it, and everywhere if the prompt does not hold them

So the keys and values before the invocation are the base's own, and any number of such adapters share them. PEFT has
the same rule (`alora_invocation_tokens`). Deviation: generated tokens never move the beginning, here and there alike,
since the prompt alone is searched.
"""

from collections.abc import Sequence


def begin(invocation: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where the last occurrence of `invocation`, not empty, begins in `tokens`; None where there is none."""
    wanted, count = list(invocation), len(invocation)
    assert count
    for first in range(len(tokens) - count, -1, -1):
        if tokens[first] == wanted[0] and list(tokens[first : first + count]) == wanted:
            return first
    return None
