"""Turn tokens into text, one request at a time. This runs on the event loop, not in the engine.

Text is held back while it ends in half a character or in a possible beginning of a stop string. Text once returned is
never taken back, even if a byte-fallback decoder, after more tokens, would read earlier bytes differently.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # decoders' output for half a character
_CHARACTER_TOKENS = 3  # tokens that half a character can have: UTF-8 has at most four bytes
_PENDING_TOKENS_MAX = 8  # held back; without a bound, undecodable bytes would cost the square of their number
_CONTEXT_TOKENS = 8  # of the prompt: a character and the word before it


class Piece(NamedTuple):
    """Text that is certain now, the stop string that ended it, if any, and the number of tokens up to there."""

    text: str
    stop: str | None = None
    num_tokens: int = 0


class Detokenizer:
    """The text of one answer. `stops` are matched from the token after `min_new_tokens` on; the earliest match wins.

    continued: the tokens that the answer continues. SentencePiece decoders drop the space before the first word that
        they see, which in a continuation is not the first word.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        continued: Sequence[int] = (),
        include_stop: bool = False,
        min_new_tokens: int = 0,
    ) -> None:
        self._decoder = _Decoder(tokenizer, continued[-_CONTEXT_TOKENS:])
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._uncounted = min_new_tokens
        self._held = ""

    def add(self, token_ids: Sequence[int]) -> Piece:
        """Add tokens; return the text that is now certain. `stop` ends the answer, and later tokens are ignored."""
        if not self._stops:
            return Piece(self._decoder.add(token_ids), None, len(token_ids))
        text = ""
        for number, token_id in enumerate(token_ids, start=1):
            new, stop = self._match(self._decoder.add([token_id]))
            text += new
            if stop is not None:
                return Piece(text, stop, number)
        return Piece(text, None, len(token_ids))

    def _match(self, new: str) -> tuple[str, str | None]:
        """Return the text that is certain after one more token's text, and the stop string that ends it."""
        self._uncounted -= 1
        if self._uncounted >= 0:
            return new, None
        text = self._held + new
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if matches:
            start, stop = min(matches, key=lambda match: (match[0], len(match[1])))
            self._held = ""
            return (text[: start + len(stop)] if self._include_stop else text[:start]), stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Return the text held back for a stop string or a character that was never completed."""
        text, self._held = self._held + self._decoder.flush(), ""
        return text


class _Decoder:
    """Decodes tokens as the tokenizer decodes them together: each after the tokens of the last complete text."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the tokens of the last complete text, and those after it
        self._num_read = 0  # how many of them are in that text
        self._read = ""  # that text
        before = self._decode(list(context))
        if not before.endswith(_INCOMPLETE):  # half a character of the prompt is not part of the answer
            self._tokens, self._num_read, self._read = list(context), len(context), before

    def add(self, token_ids: Sequence[int]) -> str:
        self._tokens += token_ids
        text = self._decode(self._tokens)
        if text.endswith(_INCOMPLETE) and len(token_ids) > 1:  # return its complete part now
            del self._tokens[len(self._tokens) - len(token_ids) :]
            return "".join(self.add([token_id]) for token_id in token_ids)
        num_new = len(self._tokens) - self._num_read
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._read):
            if num_new <= _PENDING_TOKENS_MAX:
                return ""
            num_new -= _CHARACTER_TOKENS  # bytes that are no text; a character may have begun in the last ones
            text = self._decode(self._tokens[: self._num_read + num_new])
        new = text[len(self._read) :]
        del self._tokens[: self._num_read]
        self._num_read = num_new
        self._read = self._decode(self._tokens[:num_new])
        return new

    def flush(self) -> str:
        return self._decode(self._tokens)[len(self._read) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
