"""RESULTS.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
_NAMED = re.compile(r"([\w/]+\.py)(?:::(\w+))?")


def missing(text: str) -> set[str]:
    """Return what `text` names as a file or a test and is not there."""
    absent = set()
    for file, test in _NAMED.findall(text):
        path = TESTS / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            absent.add(f"{file}::{test}")
    return absent


def test_every_test_is_there() -> None:
    text = (TESTS / "reliability" / "RESULTS.md").read_text()
    assert len(_NAMED.findall(text)) > 50
    assert missing(text) == set()
    assert {f"P{number}" for number in range(1, 39)} == set(re.findall(r"^\| (P\d+) ", text, re.MULTILINE))


def test_a_test_that_is_not_there_is_seen() -> None:
    """Negative control."""
    assert missing("reliability/test_results.py::test_nothing") == {"reliability/test_results.py::test_nothing"}
