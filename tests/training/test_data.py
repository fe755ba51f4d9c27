"""JSON Lines in, rows and batches out; unusable lines are refused by file and line."""

import json
from pathlib import Path

import pytest
import torch

from weft_training.data import IGNORED, Example, InvalidData, Row, collate, encode, read_jsonl
from weft_training.demo.tokenizer import build_tokenizer

EOS = 3
TOKENIZER = build_tokenizer(model_max_length=64)


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]  # the demo's tokenizer: an id is the ASCII code


def test_reads_both_kinds_of_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a = ", "completion": "b", "id": 7}\n\n{"text": "hello"}')
    assert read_jsonl(path) == [Example("a = ", "b", f"{path}:1"), Example("", "hello", f"{path}:3")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"prompt": "a"', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["a", "b"]', "must be an object, given list"),
        (
            b'{"prompt": "a"}',
            "must hold 'prompt' and 'completion', or 'text' alone, or 'messages' alone, given 'prompt'",
        ),
        (b'{"promt": "a", "completion": "b"}', "given 'promt', 'completion'"),
        (b'{"text": "a", "prompt": "b", "completion": "c"}', "or 'text' alone"),
        (b'{"messages": []}', "'messages' must be a list of turns, given []"),
        (b'{"messages": [], "text": ""}', "or 'messages' alone, given 'messages', 'text'"),
        (b'{"messages": ["hi"]}', "messages[0]: must hold 'role' and 'content' as strings, given 'hi'"),
        (b'{"messages": [{"role": "bot", "content": ""}]}', "messages[0].role: must be system, user or assistant"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "holds no turn of the assistant"),
        (b"{}", "given no keys"),
        (b'{"prompt": "a", "completion": null}', "'completion' must be a string, given NoneType"),
        (b'{"text": 1}', "'text' must be a string, given int"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, rule: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InvalidData) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert rule in str(error.value)


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n \n")
    with pytest.raises(InvalidData, match="holds no examples"):
        read_jsonl(path)


def test_only_the_completion_and_its_end_are_learned() -> None:
    rows = encode([Example("ab = ", "ba"), Example("", "xyz")], TOKENIZER, max_length=64)
    assert rows == [Row([*ids("ab = "), *ids("ba"), EOS], 5), Row([*ids("xyz"), EOS], 0)]

    batch = collate(rows, pad_token_id=0)

    assert batch["input_ids"].tolist() == [[*ids("ab = ba"), EOS], [*ids("xyz"), EOS, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert batch["labels"].tolist() == [[IGNORED] * 5 + [*ids("ba"), EOS], [*ids("xyz"), EOS] + [IGNORED] * 4]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_training_sees_the_tokens_that_serving_does() -> None:
    """The learned row begins with exactly the ids of its prompt alone."""
    example = Example(prompt="reverse me = ", completion=" em esrever")
    (row,) = encode([example], TOKENIZER, max_length=64)
    assert row.input_ids[: row.num_prompt_tokens] == TOKENIZER(example.prompt)["input_ids"]
    assert TOKENIZER.decode(row.input_ids[row.num_prompt_tokens : -1]) == example.completion


def test_length_is_limited_at_the_origin() -> None:
    fits = Example("a" * 60, "b" * 3, "rows.jsonl:1")  # 64 with its end
    encode([fits], TOKENIZER, max_length=64)
    with pytest.raises(InvalidData, match=r"rows\.jsonl:9: has too many tokens \(limit 64\), given 65"):
        encode([fits, Example("a" * 60, "b" * 4, "rows.jsonl:9")], TOKENIZER, max_length=64)
    with pytest.raises(InvalidData, match=r"examples\[1\]: has too many tokens"):
        encode([fits, Example("a" * 60, "b" * 4)], TOKENIZER, max_length=64)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(InvalidData, match=r"examples\[0\]: must not be empty"):
        encode([Example("", "")], TOKENIZER, max_length=64)
    with pytest.raises(InvalidData, match="there are none"):
        encode([], TOKENIZER, max_length=64)
    (row,) = encode([Example("a", "")], TOKENIZER, max_length=64)  # the empty answer is one
    assert row == Row([*ids("a"), EOS], 1)


def test_lines_survive_the_way_through_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ['tab\tquote"backslash\\', "line\nbreak", "non-ASCII ä\u2028"]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [example.completion for example in read_jsonl(path)] == texts
