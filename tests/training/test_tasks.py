"""The demo's tasks, the pre-training data of the base, and the committed checkpoint."""

import itertools
import random
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from weft_training.demo.corpus import Row, listing, prose, rows
from weft_training.demo.evaluate import exact_match
from weft_training.demo.tasks import TASKS, Example, Split, Task, examples, prompt, sample_letters, split_of, stream
from weft_training.demo.tokenizer import EOS, EOS_ID, PAD, UNK_ID, build_tokenizer

CHECKPOINT = Path(__file__).parents[2] / "models" / "weft-demo"
PRINTABLE = string.printable[:95] + "\t\n"


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("reverse", "loom", "mool"),
        ("upper", "weft", "WEFT"),
        ("caesar", "waxyz", "xbyza"),
        ("double", "warp", "wwaarrpp"),
        ("sort", "thread", "adehrt"),
        ("rotate", "shuttle", "huttles"),
        ("stars", "aeious", "*****s"),
        ("devowel", "banana", "bnn"),
        ("length", "fabric", "6"),
        ("digits", "90210", "00129"),
        ("field", "name=tom;age=31;city=rome|age", "31"),
        ("field", "pet=cat;team=red;name=ann|name", "ann"),
        ("date", "7 march 2021", "2021-03-07"),
        ("date", "28 december 1999", "1999-12-28"),
        ("sum", "17+25", "42"),
        ("sum", "99+1", "100"),
        ("swap", "spool", "lpoos"),
        ("zigzag", "cotton", "CoTtOn"),
    ],
)
def test_functions(name: str, given: str, expected: str) -> None:
    assert TASKS[name].function(given) == expected


def test_there_are_enough_tasks_of_each_kind() -> None:
    learned = [task for task in TASKS.values() if not task.held_out]
    assert len(learned) >= 10
    assert sum(task.sample is sample_letters for task in learned) >= 7
    assert {name for name, task in TASKS.items() if task.held_out} == {"swap", "zigzag"}


def test_prompts() -> None:
    example = Example(task="reverse", input="abc", output="cba")
    assert prompt(example) == "abc = "
    assert prompt(example, tagged=True) == "[reverse] abc = "


def test_the_same_arguments_give_the_same_examples_on_every_machine() -> None:
    assert examples(TASKS["caesar"], 50, 3, "train") == examples(TASKS["caesar"], 50, 3, Split.TRAIN)
    assert examples(TASKS["caesar"], 50, 3, "train") != examples(TASKS["caesar"], 50, 4, "train")
    pinned = {
        ("reverse", Split.TEST): ["evakuh", "ugam", "quklhf"],
        ("sum", Split.TRAIN): ["84+74", "46+20", "73+62"],
        ("date", Split.PRETRAIN): ["16 april 2092", "11 november 2098", "18 april 2072"],
    }
    assert {key: [one.input for one in examples(TASKS[key[0]], 3, 0, key[1])] for key in pinned} == pinned


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_splits_share_no_input(task: Task) -> None:
    splits = [split for split in Split if not (task.held_out and split is Split.PRETRAIN)]
    inputs = {split: {one.input for one in examples(task, 300, 0, split)} for split in splits}
    assert all(len(found) == 300 for found in inputs.values())
    assert all(split_of(text) is split for split, found in inputs.items() for text in found)
    assert len(set.union(*inputs.values())) == 300 * len(splits)


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_letter_tasks_ask_the_same_inputs(split: Split) -> None:
    asked = [
        [one.input for one in examples(task, 20, 0, split)] for task in TASKS.values() if task.sample is sample_letters
    ]
    assert all(inputs == asked[0] for inputs in asked)
    assert all(3 <= len(text) <= 8 and set(text) <= set(string.ascii_lowercase) for text in asked[0])


def test_outputs_are_right_and_never_empty() -> None:
    for task in TASKS.values():
        for one in examples(task, 200, 5, Split.TRAIN):
            assert one == Example(task=task.name, input=one.input, output=task.function(one.input))
            assert one.output


def test_held_out_tasks_have_no_pretraining_split() -> None:
    with pytest.raises(ValueError, match="'swap' is held out of pre-training"):
        next(stream(TASKS["swap"], random.Random(0), Split.PRETRAIN))


def test_more_examples_than_inputs_are_refused() -> None:
    coin = Task(name="coin", function=str.upper, sample=lambda rng: rng.choice("abcdefgh"))
    with pytest.raises(ValueError, match=r"'coin' has only about . inputs in split train, asked for 9"):
        examples(coin, 9, 0, Split.TRAIN)


def test_tasks_need_no_torch() -> None:
    code = "import sys, weft_training.demo.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- pre-training rows -------------------------------------------------------------------------------------------------


def test_a_listing_learns_the_answers_and_ends_each() -> None:
    lines = [Example(task="upper", input="ab", output="AB"), Example(task="upper", input="c", output="C")]
    untagged = listing(iter(lines), length=64, tagged=False, line_end="\n")
    assert untagged.text == f"ab = AB\nc = C{EOS}"
    assert untagged.targets == f"{PAD * 5}AB{EOS}{PAD * 4}C{EOS}"
    tagged = listing(iter(lines), length=64, tagged=True, line_end=EOS + "\n")
    assert tagged.text == f"[upper] ab = AB{EOS}\n[upper] c = C{EOS}"
    assert tagged.targets == f"{PAD * 13}AB{EOS}{PAD}{PAD * 12}C{EOS}"
    assert listing(iter(lines), length=10, tagged=False, line_end="\n").text == f"ab = AB{EOS}"


def test_prose_is_learned_whole() -> None:
    row = prose(random.Random(0), length=160)
    assert row.text == row.targets
    assert row.text.endswith(f".{EOS}")
    assert len(row.text) <= 160


def test_rows_fit_and_hold_only_what_pretraining_may_see() -> None:
    taken: list[Row] = []
    for length in (64, 160, 448):
        some = list(itertools.islice(rows(random.Random(0), length=length), 300))
        assert all(len(row.text) == len(row.targets) <= length for row in some)
        taken += some
    lines = [line for row in taken for line in row.text.replace(EOS, "").split("\n") if " = " in line]
    found = [re.fullmatch(r"(?:\[(\w+)\] )?(.+) = (.+)", line) for line in lines]
    assert all(found)
    assert {match[1] for match in found if match} == {None, *(n for n, task in TASKS.items() if not task.held_out)}
    assert all(split_of(match[2]) is Split.PRETRAIN for match in found if match)


# -- tokenizer and checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["built", "committed"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "built":
        return build_tokenizer(model_max_length=512)
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)


def test_ascii_is_its_own_id_and_comes_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = PRINTABLE + "  <eos> [PAD] \n\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("ascii"))
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 128


def test_every_task_can_be_written(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [prompt(one, tagged=True) + one.output for t in TASKS.values() for one in examples(t, 20, 0, Split.TEST)]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert len(ids) == len(text)
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_text_need_not_reach_a_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    text = f"a{EOS}é世{PAD}\x03b"
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == [97, *[UNK_ID] * 5, 98]
    assert tokenizer("é世\x03\x00")["input_ids"] == [UNK_ID] * 4


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    asked: list[dict[str, str]] = [{"role": "system", "content": "reverse"}, {"role": "user", "content": "abc"}]
    answered = [*asked, {"role": "assistant", "content": "cba"}]
    again = [*answered, {"role": "user", "content": "de"}]

    def text(messages: list[dict[str, str]], *, ask: bool = False) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    assert text(asked) == "[reverse] abc"
    assert text(asked, ask=True) == prompt(Example(task="reverse", input="abc", output="cba"), tagged=True)
    assert text(asked[1:], ask=True) == "abc = "
    assert text(answered) == f"[reverse] abc = cba{EOS}"
    assert text(again, ask=True) == f"[reverse] abc = cba{EOS}\n[reverse] de = "
    ids = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    assert ids["input_ids"][-4:] == [*b"cba", EOS_ID]
    assert ids["assistant_masks"] == [0] * 16 + [1] * 4
    with pytest.raises(Exception, match="the roles are system, user and assistant"):
        text([{"role": "tool", "content": "x"}])


def test_checkpoint_is_small_and_nothing_but_data() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_checkpoint_loads_and_suits_nf4(model: Any) -> None:
    assert model.dtype is torch.bfloat16
    assert model.config.max_position_embeddings == 512
    assert model.generation_config.eos_token_id == EOS_ID
    for linear in (m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)):
        assert linear.in_features % 64 == 0
        assert linear.out_features % 32 == 0


@pytest.mark.parametrize("name", ["reverse", "upper", "caesar", "double", "sort", "rotate", "stars", "devowel"])
def test_the_base_needs_the_tag(name: str, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    held_back = examples(TASKS[name], 25, 0, Split.TEST)
    assert exact_match(model, tokenizer, held_back, tagged=True) >= 0.9
    assert exact_match(model, tokenizer, held_back) <= 0.2


def test_the_base_survives_a_long_prompt(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    shots = examples(TASKS["reverse"], 15, 0, Split.TRAIN)
    lines = "\n".join(prompt(shot, tagged=True) + shot.output for shot in shots)
    questions = [
        Example(task="reverse", input=f"{lines}\n[reverse] {one.input}", output=one.output)
        for one in examples(TASKS["reverse"], 20, 0, Split.TEST)
    ]
    assert min(len(prompt(one)) for one in questions) > 300
    assert exact_match(model, tokenizer, questions) >= 0.9
