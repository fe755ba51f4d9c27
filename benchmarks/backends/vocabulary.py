"""Words that stand for token ids, for servers that exchange only text. Standard library only."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"w(\d+)")


def words(vocab_size: int) -> list[str]:
    """Return the word of each token."""
    return [f"w{token_id}" for token_id in range(vocab_size)]


def text(token_ids: Sequence[int]) -> str:
    """Return the words of these tokens, separated by spaces."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def token_ids(text: str) -> tuple[int, ...]:
    """Return the tokens of a text of words, with or without spaces between them."""
    return tuple(int(number) for number in _WORD.findall(text))
