"""Conversations: only the assistant's messages are learned."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from weft_training.data import IGNORED, Conversation, Example, InvalidData, encode, read_jsonl, split
from weft_training.demo.tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% if m.role == 'assistant' %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TURNS = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = build_tokenizer(model_max_length=64)
    made.chat_template = template
    return made


def test_the_assistants_turns_alone_are_learned() -> None:
    tokens = tokenizer()
    (row,) = encode([Conversation(TURNS)], tokens, max_length=64)
    eos = tokens.eos_token_id
    assert tokens.decode(row.input_ids[:-1]) == "<s>s<u>one<a>two;<u>three<a>four;"
    assert row.input_ids[-1] == eos
    learned = [token for token in row.labels if token != IGNORED]
    assert tokens.decode(learned[:-1]) == "two;four;"
    assert learned[-1] == eos
    assert [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED] == learned


def test_the_prompt_is_what_serving_renders() -> None:
    tokens = tokenizer()
    (row,) = encode([Conversation(TURNS[:3])], tokens, max_length=64)
    served = tokens.apply_chat_template([dict(turn) for turn in TURNS[:2]], add_generation_prompt=True, tokenize=False)
    assert row.input_ids[: row.num_prompt_tokens] == tokens(served, add_special_tokens=False)["input_ids"]


def test_what_a_template_cannot_say_is_refused_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"messages": TURNS}) + "\n")
    examples = read_jsonl(path)
    assert examples == [Example("", "x", f"{path}:1"), Conversation(TURNS, f"{path}:2")]
    encode(examples, tokenizer(), max_length=64)
    for template, message in (
        (None, "the base has no chat template"),
        ("{{ raise_exception('no system turn') }}", "does not take these messages: no system turn"),
        (
            "{{ messages | length }}" + TEMPLATE,
            r"messages\[2\]: the chat template renders the turns before it otherwise",
        ),
    ):
        with pytest.raises(InvalidData, match=rf"rows\.jsonl:2: .*{message}|rows\.jsonl:2: {message}"):
            encode(examples, tokenizer(template), max_length=64)
    with pytest.raises(InvalidData, match=r"rows\.jsonl:2: has too many tokens \(limit 20\)"):
        encode(examples, tokenizer(), max_length=20)


def test_several_files_are_one_and_each_must_hold_something(tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    one.write_text('{"text": "a"}\n')
    two.write_text('{"text": "b"}\n')
    assert [example.origin for example in read_jsonl(one, two)] == [f"{one}:1", f"{two}:1"]
    two.write_text("\n")
    with pytest.raises(InvalidData, match=r"2\.jsonl: holds no examples"):
        read_jsonl(one, two)


def test_a_share_is_kept_apart() -> None:
    examples = [Example(str(index), "") for index in range(10)]
    learned, kept = split(examples, 0.3, seed=1)
    assert (len(learned), len(kept)) == (7, 3)
    assert sorted([*learned, *kept]) == sorted(examples)
    assert split(examples, 0.3, seed=1) == (learned, kept)
    assert split(examples, 0.3, seed=2) != (learned, kept)
    assert len(split(examples, 0.01, seed=1)[1]) == 1
    with pytest.raises(InvalidData, match="at least 2"):
        split(examples[:1], 0.5, seed=1)
