"""Tokenize inputs: text, or a conversation rendered by the base's chat template."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weft.api.validation import ChatMessage, check_prompt_bytes
from weft.config import RequestLimits
from weft.errors import InvalidRequest

_INLINE_PROMPT_BYTES = 4096  # shorter prompts are tokenized on the event loop, because a thread would cost more


@dataclass(frozen=True)
class PromptEncoder:
    """Tokenizes prompts. tokenizer: a fast transformers tokenizer."""

    tokenizer: Any
    limits: RequestLimits

    async def encode(self, text: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        """Return the tokens of the one given input; long texts and conversations are tokenized in a thread."""
        if text is None:
            return await asyncio.to_thread(self._encode_messages, messages or ())
        if len(text) <= _INLINE_PROMPT_BYTES:
            return self._encode(text)
        return await asyncio.to_thread(self._encode, text)

    def _encode(self, text: str) -> list[int]:
        # Special tokens spelled out in a prompt are ordinary text.
        return self.tokenizer(text, split_special_tokens=True)["input_ids"]

    def _encode_messages(self, messages: Sequence[ChatMessage]) -> list[int]:
        tokenizer, as_mappings = self.tokenizer, [message._asdict() for message in messages]
        try:
            rendered = tokenizer.apply_chat_template(as_mappings, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise anything; as it is the base's, its text may be shown
            rule = "do not fit the chat template"
            raise InvalidRequest.rule("PROMPT_INVALID", "messages", rule, given=error) from error
        check_prompt_bytes("messages", len(rendered.encode()), self.limits)
        specials = [special for special in tokenizer.all_special_tokens if special]
        if not any(special in message.content for message in messages for special in specials):
            return tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [
            token
            for text, is_template in _pieces(rendered, [message.content for message in messages])
            if text
            for token in tokenizer(text, add_special_tokens=False, split_special_tokens=not is_template)["input_ids"]
        ]


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
