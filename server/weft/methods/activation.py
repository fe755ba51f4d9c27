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

    Token ids stand for characters, below 0x110000, because Python's search in a text takes linear time, however an
    invocation repeats itself. The text is reversed, since only `find` promises that, and not `rfind`.
    """
    text, wanted = ("".join(map(chr, reversed(ids))) for ids in (tokens, invocation))
    found = text.find(wanted)
    return None if found < 0 else len(tokens) - len(wanted) - found
