"""Training data: JSON Lines files, and the rows a model learns from.

A line is `{"prompt": …, "completion": …}`, of which the completion is learned, or `{"text": …}`, learned whole; further
keys are left alone. Prompt and completion are tokenized apart, because that is how serving meets them: the prompt is
tokenized, the completion is generated. Every completion ends with the end-of-text token.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy leaves out


class InvalidData(ValueError):
    """A line of a data file, or an example, that cannot be learned from."""


class Example(NamedTuple):
    """What the model is given and what it is to answer. origin: where it stands (`rows.jsonl:3`), for error texts."""

    prompt: str
    completion: str
    origin: str = ""


class Row(NamedTuple):
    """An example as token ids; the first `num_prompt_tokens` are not learned."""

    input_ids: list[int]
    num_prompt_tokens: int


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a file. Blank lines are skipped; any other line that is no example raises InvalidData."""
    with path.open("rb") as file:
        examples = [_parse(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]
    if not examples:
        raise InvalidData(f"{path}: holds no examples")
    return examples


def _parse(line: bytes, origin: str) -> Example:
    try:
        value: Any = json.loads(line)  # UnicodeDecodeError and JSONDecodeError are ValueErrors
    except ValueError as error:
        raise InvalidData(f"{origin}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidData(f"{origin}: must be an object, given {type(value).__name__}")
    present = [key for key in ("text", "prompt", "completion") if key in value]
    if present not in (["text"], ["prompt", "completion"]):
        given = ", ".join(map(repr, value)) or "no keys"
        raise InvalidData(f"{origin}: must hold 'prompt' and 'completion', or 'text' alone, given {given}")
    for key in present:
        if not isinstance(value[key], str):
            raise InvalidData(f"{origin}: {key!r} must be a string, given {type(value[key]).__name__}")
    return Example(value.get("prompt", ""), value["text"] if present == ["text"] else value["completion"], origin)


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Row]:
    """Token ids of every example. Raises InvalidData for one that is longer than `max_length` or teaches nothing."""
    return list(_rows(examples, tokenizer, max_length))


def _rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Row]:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("base: its tokenizer has no end-of-text token, so a completion could not be ended")
    if not examples:
        raise InvalidData("examples: there are none")
    for index, example in enumerate(examples):
        prompt: list[int] = tokenizer(example.prompt)["input_ids"]  # pyright: ignore
        completion: list[int] = tokenizer(example.completion, add_special_tokens=False)["input_ids"]  # pyright: ignore
        ids = [*prompt, *completion, eos]
        origin = example.origin or f"examples[{index}]"
        if len(ids) > max_length:
            raise InvalidData(f"{origin}: has too many tokens (limit {max_length}), given {len(ids)}")
        if len(ids) < 2:  # nothing comes before the only token, so it is never predicted
            raise InvalidData(f"{origin}: must not be empty")
        yield Row(ids, len(prompt))


def collate(rows: Sequence[Row], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch, all [B, T]: rows padded on the right, labels IGNORED on prompts and padding."""
    width = max(len(row.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        attention_mask[i, :length] = 1
        labels[i, row.num_prompt_tokens : length] = input_ids[i, row.num_prompt_tokens : length]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
