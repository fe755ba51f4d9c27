"""Readers of hostile bytes, on seeded mutations of good ones (T30). `make fuzz` runs them guided by coverage."""

import itertools
import time

import pytest

from tests.bases import Bases
from tests.reliability.fuzz.mutation import CASE_S_MAX, Failure, mutated, run
from tests.reliability.fuzz.targets import Target, targets

NAMES = (
    "header",
    "adapter_config",
    "mixture_config",
    "request",
    "json",
    "manifest",
    "token_ranges",
    "reference",
)
_CASES = 10_000


@pytest.fixture(scope="module")
def found(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(bases(), tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_only_refusals_come_out(name: str, found: dict[str, Target]) -> None:
    assert set(found) == set(NAMES)
    target = found[name]
    assert all(run(target, example) for example in target.examples)
    assert _run_many(target) < _CASES  # some are refused: the mutations do damage


def test_a_reader_that_crashes_is_caught() -> None:
    """Negative control: on a byte that no example holds, and on one that takes long."""

    def crash(data: bytes) -> None:
        if 0xFE in data:
            raise RuntimeError("planted")

    def hang(data: bytes) -> None:
        if 0xFE in data:
            time.sleep(0.05)

    for read, words in ((crash, "planted"), (hang, "took")):
        target = Target([b"example"], read)
        with pytest.raises(Failure, match=words) as caught:
            _run_many(target, case_s_max=0.02)
        assert "\\xfe" in str(caught.value)
    same = [list(itertools.islice(mutated(target, seed=7), 9)) for _ in range(2)]
    assert same[0] == same[1]


def _run_many(target: Target, *, case_s_max: float = CASE_S_MAX) -> int:
    """Return how many of the cases were accepted."""
    cases = itertools.islice(mutated(target, seed=7), _CASES)
    return sum(run(target, data, case_s_max=case_s_max) for data in cases)
