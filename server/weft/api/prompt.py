"""Tokenize inputs: text, or a conversation rendered by the base's chat template.

Tokenizing takes memory and time that grow with the text, a few hundred times its bytes. So a text that cannot fit the
model is refused by its bytes, long ones share two threads and a quota, and the rest is short.

Whether special tokens spelled out in a text count as such is a setting of the whole Rust tokenizer, and transformers'
own calls change it there. Threads would change it under each other, so each of the two settings has a tokenizer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from weft.api.quota import Quota
from weft.api.validation import ChatMessage, check_prompt_bytes
from weft.api.work import Work
from weft.config import RequestLimits
from weft.errors import InvalidRequest

_INLINE_PROMPT_BYTES = 4096  # shorter prompts are tokenized on the event loop, because a thread would cost more


class PromptEncoder:
    """Tokenizes prompts.

    tokenizer: a fast transformers tokenizer, whose Rust half becomes ours. max_model_len: tokens that a prompt and its
    answer may have. waiting: quota of the bytes that wait for a thread.
    """

    def __init__(
        self, tokenizer: Any, limits: RequestLimits, *, max_model_len: int, waiting: Quota, work: Work
    ) -> None:
        self._tokenizer = tokenizer
        self._of_text = _backend(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), specials_are_text=True)
        self._of_template = _backend(tokenizer.backend_tokenizer, specials_are_text=False)
        self._limits = limits
        self._bytes_max = _fitting_bytes(tokenizer, max_model_len)
        self._waiting = waiting
        self._work = work

    def require_fit(self, text: str | None, messages: Sequence[ChatMessage] | None) -> None:
        """Raise PROMPT_TOO_LONG for an input with more bytes than the model has room for."""
        field = "messages" if text is None else "text"
        given = _num_bytes(text, messages)
        if given > self._bytes_max:
            rule = "has too many bytes for max_model_len"
            raise InvalidRequest.rule("PROMPT_TOO_LONG", field, rule, limit=self._bytes_max, given=given)

    async def encode(self, text: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        """Return the tokens of the one given input; long texts and conversations are tokenized in a thread.

        Raises Overloaded PROMPTS_FULL if too many bytes wait for one.
        """
        num_bytes = _num_bytes(text, messages)
        if text is not None and num_bytes <= _INLINE_PROMPT_BYTES:
            return _encode(self._of_text, text)
        with self._waiting.held(num_bytes):
            if text is None:
                return await self._work.tokenize(self._encode_messages, messages or ())
            return await self._work.tokenize(_encode, self._of_text, text)

    def _encode_messages(self, messages: Sequence[ChatMessage]) -> list[int]:
        tokenizer, as_mappings = self._tokenizer, [message._asdict() for message in messages]
        try:
            rendered = tokenizer.apply_chat_template(as_mappings, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise anything; as it is the base's, its text may be shown
            rule = "do not fit the chat template"
            raise InvalidRequest.rule("PROMPT_INVALID", "messages", rule, given=error) from error
        check_prompt_bytes("messages", len(rendered.encode()), self._limits)
        specials = [special for special in tokenizer.all_special_tokens if special]
        if not any(special in message.content for message in messages for special in specials):
            return _encode(self._of_template, rendered, adds_specials=False)
        return [
            token
            for text, is_template in _pieces(rendered, [message.content for message in messages])
            if text
            for token in _encode(self._of_template if is_template else self._of_text, text, adds_specials=False)
        ]


def _fitting_bytes(tokenizer: Any, max_model_len: int) -> int:
    """Return the most bytes of a text that may fit the model: its tokens, each as long as the longest one.

    A tokenizer that drops characters could take more; such a text is refused too, unless it is short.
    """
    longest = max((len(piece.encode()) for piece in tokenizer.get_vocab()), default=1)
    return max(_INLINE_PROMPT_BYTES, (max_model_len - 1) * longest)


def _backend(backend: Tokenizer, *, specials_are_text: bool) -> Tokenizer:
    """Return the tokenizer with one meaning of special tokens in its texts, and nothing cut or padded."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = specials_are_text
    return backend


def _encode(backend: Tokenizer, text: str, *, adds_specials: bool = True) -> list[int]:
    """Return a text's tokens, by the call that computes nothing else: offsets take half of the memory."""
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=adds_specials)
    return encoding.ids


def _num_bytes(text: str | None, messages: Sequence[ChatMessage] | None) -> int:
    texts = [text] if text is not None else [part for message in messages or () for part in message]
    return sum(len(text.encode()) for text in texts)


def _pieces(rendered: str, contents: list[str]) -> Iterator[tuple[str, bool]]:
    """Cut a rendered conversation into pieces of the template (True) and of the messages (False), in order.

    Pieces may be empty. A template may trim a message. If a message cannot be found again, the whole rest counts as
    message.
    """
    position = 0
    for said in filter(None, map(str.strip, contents)):
        start = rendered.find(said, position)
        if start < 0:
            yield rendered[position:], False
            return
        yield rendered[position:start], True
        yield said, False
        position = start + len(said)
    yield rendered[position:], True
