"""The table of the demo's adapters, and that the committed adapters reach it."""

import pytest
from tests.bases import load

from weft.config import Quantization
from weft_training import adapter, shipped
from weft_training.adapter import AdaptedModel
from weft_training.demo.adapters import LIVE, RECIPES
from weft_training.demo.document import insert, markdown
from weft_training.demo.evaluate import exact_match, rows
from weft_training.demo.tasks import TASKS, Split, examples

SCORES = {
    "reverse": {"base": 0.0, "base, tagged": 0.99, "lora": 1.0, "ia3": 0.955},
    "zigzag": {"base": 0.0, "lora": 0.9},
}
TABLE = """\
| task | base | base, tagged | lora | ia3 |
|---|---:|---:|---:|---:|
| reverse | 0% | 99% | 100% | 96% |
| zigzag (held out) | 0% |  | 90% |  |"""


def test_markdown_goes_between_the_markers() -> None:
    assert markdown(rows(SCORES)) == TABLE
    document = "before\n<!-- evaluation -->\nold\n<!-- /evaluation -->\nafter\n"
    changed = insert(TABLE, document, "evaluation")
    assert changed == f"before\n<!-- evaluation -->\n{TABLE}\n<!-- /evaluation -->\nafter\n"
    assert insert("", changed, "evaluation").count("\n") == 5


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 times"):
        insert(TABLE, "no markers", "evaluation")


def test_the_live_task_has_no_committed_adapter() -> None:
    assert LIVE.task not in {recipe.task for recipe in RECIPES}


def test_the_committed_adapters_are_those_of_the_recipes() -> None:
    assert {path.name for path in shipped.ADAPTERS.iterdir()} == {recipe.name for recipe in RECIPES}


def test_committed_adapters_do_their_tasks_on_the_nf4_base() -> None:
    """A sample of the measurements of `python -m weft_training.demo.evaluate`; it would detect an untrained adapter."""
    base = load(shipped.BASE, Quantization.NF4, attention="sdpa")
    for recipe in RECIPES:
        adapted = AdaptedModel(base, adapter.read(shipped.ADAPTERS / recipe.name, base.shape))
        held_back = examples(TASKS[recipe.task], 30, 5, Split.TEST)
        assert exact_match(adapted, base.tokenizer, held_back) >= 0.8, recipe.name
        assert exact_match(base.model, base.tokenizer, held_back) <= 0.2, recipe.task
