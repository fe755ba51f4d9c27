"""Training data: JSON Lines files, and the rows made from them.

A line is `{"prompt": …, "completion": …}`, of which the completion is learned, `{"text": …}`, learned whole, or
`{"messages": [{"role": …, "content": …}, …]}`, of which the assistant's turns are learned; other keys are ignored.
Prompt and completion are tokenized separately, as in serving, which tokenizes the prompt and generates the completion.
Every completion ends with the end-of-text token.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy ignores

_KINDS = (["text"], ["prompt", "completion"], ["messages"])


class InvalidData(ValueError):
    """A line of a data file, or an example, that training cannot use."""


class Example(NamedTuple):
    """A prompt and its completion. origin: position in the data (`rows.jsonl:3`), for error texts."""

    prompt: str
    completion: str
    origin: str = ""


class Conversation(NamedTuple):
    """Turns in order, each with a role and a content; the assistant's are learned."""

    messages: tuple[Mapping[str, str], ...]
    origin: str = ""


class Row(NamedTuple):
    """An example as token ids, learned except the first `num_prompt_tokens` and the ranges `unlearned` [start, end)."""

    input_ids: list[int]
    num_prompt_tokens: int
    unlearned: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> list[int]:
        """Token ids, or IGNORED for those that are not learned."""
        labels = [IGNORED] * self.num_prompt_tokens + self.input_ids[self.num_prompt_tokens :]
        for start, end in self.unlearned:
            labels[start:end] = [IGNORED] * (end - start)
        return labels


def read_jsonl(*paths: Path) -> list[Example | Conversation]:
    """Return the examples of all files, without blank lines. Raises InvalidData for a line that is not an example."""
    examples: list[Example | Conversation] = []
    for path in paths:
        before = len(examples)
        with path.open("rb") as file:
            examples += [_parse(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]
        if len(examples) == before:
            raise InvalidData(f"{path}: holds no examples")
    return examples


def _parse(line: bytes, origin: str) -> Example | Conversation:
    try:
        value: Any = json.loads(line)  # UnicodeDecodeError and JSONDecodeError are ValueErrors
    except ValueError as error:
        raise InvalidData(f"{origin}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidData(f"{origin}: must be an object, given {type(value).__name__}")
    present = [key for kind in _KINDS for key in kind if key in value]
    if present not in _KINDS:
        given = ", ".join(map(repr, value)) or "no keys"
        raise InvalidData(
            f"{origin}: must hold 'prompt' and 'completion', or 'text' alone, or 'messages' alone, given {given}"
        )
    if present == ["messages"]:
        return Conversation(_messages(value["messages"], origin), origin)
    for key in present:
        if not isinstance(value[key], str):
            raise InvalidData(f"{origin}: {key!r} must be a string, given {type(value[key]).__name__}")
    return Example(value.get("prompt", ""), value["text"] if present == ["text"] else value["completion"], origin)


def _messages(value: Any, origin: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{origin}: 'messages' must be a list of turns, given {value!r:.40}")
    turns = []
    for index, turn in enumerate(value):
        where = f"{origin}: messages[{index}]"
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise InvalidData(f"{where}: must hold 'role' and 'content' as strings, given {turn!r:.60}")
        if turn["role"] not in ("system", "user", "assistant"):
            raise InvalidData(f"{where}.role: must be system, user or assistant, given {turn['role']!r}")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if all(turn["role"] != "assistant" for turn in turns):
        raise InvalidData(f"{origin}: 'messages' holds no turn of the assistant, so nothing to learn")
    return tuple(turns)


def encode(
    examples: Sequence[Example | Conversation], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Row]:
    """Tokenize every example. Raises InvalidData for one that is longer than `max_length` or teaches nothing."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("base: its tokenizer has no end-of-text token, so a completion could not be ended")
    if not examples:
        raise InvalidData("examples: there are none")
    rows: list[Row] = []
    for index, example in enumerate(examples):
        origin = example.origin or f"examples[{index}]"
        if isinstance(example, Conversation):
            row = _conversation(example.messages, tokenizer, origin)
        else:
            prompt = _ids(tokenizer, example.prompt, add_special_tokens=True)
            row = Row([*prompt, *_ids(tokenizer, example.completion), tokenizer.eos_token_id], len(prompt))
        if len(row.input_ids) > max_length:
            raise InvalidData(f"{origin}: has too many tokens (limit {max_length}), given {len(row.input_ids)}")
        if len(row.input_ids) < 2:  # the only token has nothing before it, so it is never predicted
            raise InvalidData(f"{origin}: must not be empty")
        rows.append(row)
    return rows


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]  # pyright: ignore


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, origin: str) -> Row:
    """Tokenize a conversation by the chat template, cut at the beginning and end of each of the assistant's answers.

    Each piece is tokenized separately, so that an answer's tokens are those generated after its prompt, and no token
    straddles an answer's boundary. What the template writes after an answer (its end mark) is learned with it.
    """
    ids: list[int] = []
    learned: list[tuple[int, int]] = []
    rendered = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], origin, add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1], origin, add_generation_prompt=False)
        if not before.startswith(rendered) or not after.startswith(before):
            raise InvalidData(
                f"{origin}: messages[{index}]: the chat template renders the turns before it otherwise once it is "
                "there, so what is learned would not be what is served; split the conversation, one answer a line"
            )
        ids += _ids(tokenizer, before[len(rendered) :])
        answer = _ids(tokenizer, after[len(before) :])
        is_last = all(later["role"] != "assistant" for later in messages[index + 1 :])
        if is_last and tokenizer.eos_token_id not in answer:
            answer.append(tokenizer.eos_token_id)  # pyright: ignore
        learned.append((len(ids), len(ids) + len(answer)))
        ids += answer
        rendered = after
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(learned) if end < start]
    return Row(ids, learned[0][0], tuple(gaps))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    origin: str,
    *,
    add_generation_prompt: bool,
) -> str:
    if tokenizer.chat_template is None:
        raise InvalidData(f"{origin}: the base has no chat template; give 'prompt' and 'completion' instead")
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise InvalidData(f"{origin}: the chat template does not take these messages: {error}") from None
    assert isinstance(rendered, str)
    return rendered


def split(
    examples: Sequence[Example | Conversation], share: float, seed: int
) -> tuple[list[Example | Conversation], list[Example | Conversation]]:
    """Return the training examples, and a random `share` of at least one for evaluation; both keep their order."""
    if len(examples) < 2:
        raise InvalidData(f"examples: must be at least 2, to keep a share for evaluation, given {len(examples)}")
    num_kept = min(max(1, round(share * len(examples))), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[:num_kept])
    return (
        [one for index, one in enumerate(examples) if index not in kept],
        [one for index, one in enumerate(examples) if index in kept],
    )


def digest(rows: Sequence[Row]) -> str:
    """Return the sha256 of the token ids and labels in order."""
    whole = hashlib.sha256(b"weft-rows-1\n")
    for row in rows:
        whole.update(json.dumps([row.input_ids, row.num_prompt_tokens, row.unlearned]).encode() + b"\n")
    return whole.hexdigest()


def collate(rows: Sequence[Row], *, pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch, all [B, T]: rows padded on the right, with IGNORED labels on prompts and padding."""
    width = max(len(row.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        attention_mask[i, :length] = 1
        labels[i, :length] = torch.tensor(row.labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
