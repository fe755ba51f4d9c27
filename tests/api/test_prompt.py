"""Tokenizing prompts: by several threads, within the memory that it may take."""

import asyncio
import threading
from typing import Any

import pytest
from tests.bases import Bases

from weft.api.prompt import PromptEncoder
from weft.api.quota import Quota
from weft.api.validation import ChatMessage
from weft.api.work import Work
from weft.config import RequestLimits
from weft.errors import InvalidRequest, Overloaded

_SPECIAL = "<|special|>"
_TEMPLATE = "{% for m in messages %}" + _SPECIAL + "{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer(bases: Bases) -> Any:
    tokenizer: Any = bases.fresh().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [_SPECIAL]})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _encoder(tokenizer: Any, work: Work, *, max_model_len: int = 4096, waiting_bytes: int = 1 << 20) -> PromptEncoder:
    waiting = Quota("prompt_bytes_waiting", waiting_bytes, "PROMPTS_FULL")
    return PromptEncoder(tokenizer, RequestLimits(), max_model_len=max_model_len, waiting=waiting, work=work)


async def test_special_tokens_keep_their_meaning_beside_other_threads(tokenizer: Any) -> None:
    """A text's are text and a template's are tokens, whatever is tokenized at the same time."""
    work = Work()
    encoder = _encoder(tokenizer, work)
    text = f"hello {_SPECIAL} " * 50
    long, conversation = text * 10, [ChatMessage("user", "hello")] * 50
    special = tokenizer.convert_tokens_to_ids(_SPECIAL)
    alone = [
        await encoder.encode(text, None),
        await encoder.encode(long, None),
        await encoder.encode(None, conversation),
    ]
    assert special not in alone[0] + alone[1]
    assert alone[2].count(special) == 50
    for _ in range(100):
        calls = (encoder.encode(long, None), encoder.encode(None, conversation), encoder.encode(text, None))
        tokens = await asyncio.gather(*calls)
        assert tokens == [alone[1], alone[2], alone[0]]
    await work.close()


def test_the_setting_that_transformers_changes_is_shared(tokenizer: Any) -> None:
    """Negative control: by transformers' own calls, the meaning of one text is that of the call before it."""
    special, backend = tokenizer.convert_tokens_to_ids(_SPECIAL), tokenizer.backend_tokenizer
    for as_text in (True, False):
        tokenizer("x", split_special_tokens=as_text)  # of another thread, a moment before
        assert (special not in backend.encode(_SPECIAL).ids) == as_text


async def test_what_can_never_fit_is_refused_by_its_bytes(tokenizer: Any) -> None:
    work = Work()
    encoder = _encoder(tokenizer, work, max_model_len=512)
    encoder.require_fit("x" * 4096, None)
    longest = max(len(piece.encode()) for piece in tokenizer.get_vocab())
    with pytest.raises(InvalidRequest, match="text: has too many bytes for max_model_len") as refused:
        encoder.require_fit("x" * (511 * longest + 1), None)
    assert refused.value.reason == "PROMPT_TOO_LONG"
    with pytest.raises(InvalidRequest, match="messages: has too many bytes"):
        encoder.require_fit(None, [ChatMessage("user", "x" * 300 * longest)] * 2)
    await work.close()


async def test_long_prompts_wait_within_a_quota(tokenizer: Any) -> None:
    work = Work()
    encoder = _encoder(tokenizer, work, waiting_bytes=10_000)
    hold = threading.Event()
    blocked = [work.prompts.submit(hold.wait) for _ in range(2)]
    waiting = asyncio.create_task(encoder.encode("x" * 9_000, None))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=r"prompt_bytes_waiting: too many at a time \(limit 10000\), given 14000"):
        await encoder.encode("x" * 5_000, None)
    assert await encoder.encode("x", None), "short prompts need no thread"
    hold.set()
    assert await waiting
    assert await encoder.encode("x" * 5_000, None)
    assert all(one.result() for one in blocked)
    await work.close()
