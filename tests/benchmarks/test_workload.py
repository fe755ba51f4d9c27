"""Traces: they survive writing and reading, and the generators draw from the named distributions."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from benchmarks import workload
from benchmarks.workload import Length, Popularity, Registration, Trace

IDS = [f"a{number}" for number in range(8)]


def made(popularity: Popularity = workload.base_only, *, seed: int = 0, new_tokens: Length | None = None) -> Trace:
    return workload.generate(
        50,
        arrivals=workload.poisson(10),
        popularity=popularity,
        prompt_tokens=workload.between(3, 9),
        new_tokens=new_tokens or workload.fixed(4),
        vocab_size=100,
        seed=seed,
    )


def test_round_trip(tmp_path: Path) -> None:
    trace = workload.generate(
        20,
        arrivals=workload.gamma(5, cv=2),
        popularity=workload.uniform(IDS),
        prompt_tokens=workload.lognormal(8, sigma=1, num_tokens_max=30),
        new_tokens=workload.between(1, 4),
        vocab_size=100,
        registrations=workload.churn([("new-0", "/somewhere/0"), ("new-1", "/somewhere/1")], every_s=0.5),
    )
    path = workload.write(trace, tmp_path / "of" / "trace.jsonl")
    assert workload.read(path) == trace
    assert len(path.read_text().splitlines()) == 22


@pytest.mark.parametrize("line", ["{}", "[]", "no json", '{"arrival_s": 0, "register": "a"}', "7"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = workload.write(made(), tmp_path / "trace.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 51: is no request"):
        workload.read(path)


def test_a_seed_is_a_trace() -> None:
    assert made(workload.uniform(IDS)) == made(workload.uniform(IDS))
    assert made(workload.uniform(IDS)) != made(workload.uniform(IDS), seed=1)


def test_what_is_not_asked_to_differ_does_not() -> None:
    base, adapted = made(), made(workload.zipf(IDS, alpha=1), new_tokens=workload.between(2, 6))
    assert [one.prompt for one in base.requests] == [one.prompt for one in adapted.requests]
    assert [one.arrival_s for one in base.requests] == [one.arrival_s for one in adapted.requests]
    assert {one.num_new_tokens for one in adapted.requests} == {2, 3, 4, 5, 6}


def test_no_prompt_holds_the_padding() -> None:
    tokens = [token for one in made().requests for token in one.prompt]
    assert min(tokens) >= 1
    assert max(tokens) <= 99


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gaps_have_their_mean_and_spread(cv: float) -> None:
    times = list(itertools.islice(workload.gamma(20, cv=cv)(random.Random(3)), 40_000))
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.04)


def test_a_fixed_batch_comes_at_once() -> None:
    assert list(itertools.islice(workload.at_once(random.Random()), 3)) == [0.0, 0.0, 0.0]


def shares(popularity: Popularity, count: int = 40_000) -> list[float]:
    drawn = Counter(adapters for adapters in itertools.islice(popularity(random.Random(5)), count))
    assert set(drawn) <= {(name,) for name in IDS}
    return [drawn[(name,)] / count for name in IDS]


def test_popularity() -> None:
    assert shares(workload.identical(IDS)) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert shares(workload.distinct(IDS)) == [1 / 8] * 8
    assert shares(workload.uniform(IDS)) == pytest.approx([1 / 8] * 8, rel=0.05)
    weights = np.array([1 / rank**1.2 for rank in range(1, 9)])
    assert shares(workload.zipf(IDS, alpha=1.2)) == pytest.approx(list(weights / weights.sum()), rel=0.06)
    assert shares(workload.uniform(IDS)) != pytest.approx(list(weights / weights.sum()), rel=0.06)


def test_distinct_adapters_come_in_turn() -> None:
    assert [one.adapters for one in made(workload.distinct(IDS)).requests[6:10]] == [("a6",), ("a7",), ("a0",), ("a1",)]


def test_lengths() -> None:
    dice = random.Random(7)
    assert {workload.fixed(5)(dice) for _ in range(9)} == {5}
    drawn = [workload.between(2, 4)(dice) for _ in range(3000)]
    assert [drawn.count(n) / 3000 for n in (2, 3, 4)] == pytest.approx([1 / 3] * 3, rel=0.1)
    longer = np.array([workload.lognormal(100, sigma=0.5, num_tokens_max=150)(dice) for _ in range(20_000)])
    assert np.median(longer) == pytest.approx(100, rel=0.03)
    assert longer.max() == 150
    assert np.std(np.log(longer[longer < 100])) < 0.5  # half a normal distribution is narrower
    assert np.mean(np.log(longer[longer < 100] / 100)) == pytest.approx(-0.5 * np.sqrt(2 / np.pi), rel=0.05)


def test_churn_comes_at_its_rate() -> None:
    listed = workload.churn([("x", "/x"), ("y", "/y")], every_s=2.0)
    assert listed == (
        Registration(arrival_s=2.0, adapter_id="x", path="/x"),
        Registration(arrival_s=4.0, adapter_id="y", path="/y"),
    )
