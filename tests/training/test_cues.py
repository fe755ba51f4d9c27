"""Cues: each belongs to one task, and no test question was trained on."""

import itertools
import random

from weft_training.demo import corpus
from weft_training.demo.cues import CUES, cued_examples
from weft_training.demo.tasks import TASKS, Split, split_of


def test_every_cue_is_of_one_task() -> None:
    whole = [cue for cues in CUES.values() for cue in cues]
    assert len(set(whole)) == len(whole)
    assert set(CUES) <= set(TASKS)


def test_prompts_take_turns_and_keep_to_their_split() -> None:
    drawn = cued_examples("reverse", 30, 3, Split.TEST)
    assert all(split_of(one.input) is Split.TEST and one.output == one.input[::-1] for _, one in drawn)
    assert {text.partition(":")[0] for text, _ in drawn} == set(CUES["reverse"])
    assert all(text == f"{text.partition(':')[0]}: {one.input} = " for text, one in drawn)
    learned = {one.input for _, one in cued_examples("upper", 300, 0, Split.TRAIN)}
    assert not learned & {one.input for _, one in drawn}


def test_no_row_of_pretraining_holds_a_cue() -> None:
    rows = [row.text for row in itertools.islice(corpus.rows(random.Random(0), length=200), 500)]
    cues = [f"{cue}:" for cues in CUES.values() for cue in cues]
    assert not [row for row in rows for cue in cues if cue in row]
    assert any("[reverse] " in row for row in rows)  # the control: what the base did learn is found
