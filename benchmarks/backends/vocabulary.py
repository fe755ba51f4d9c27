"""Words that stand for token ids where a server takes or gives text only. Standard library alone."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"w(\d+)")


def words(vocab_size: int) -> list[str]:
    """The word of each token."""
    return [f"w{token_id}" for token_id in range(vocab_size)]


def text(token_ids: Sequence[int]) -> str:
    """The words of these tokens, with spaces between."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def token_ids(text: str) -> tuple[int, ...]:
    """The tokens of a text of words, with or without spaces between."""
    return tuple(int(number) for number in _WORD.findall(text))
