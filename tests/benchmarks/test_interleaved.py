"""Scenarios, measured with scripted backends whose numbers are known, and once with real ones on a tiny model."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import models, results, workload
from benchmarks.backends.remote import Remote
from benchmarks.interleaved import Bench, Key, ScenarioResult, Tick
from benchmarks.models import Hold, lora_of
from benchmarks.scenarios import Goal, Other, Scenario, Side, at_least, at_most
from benchmarks.workload import Trace

NUM_NEW = 4
TINY = models.Size(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=models.VOCAB_SIZE
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.save(TINY, tmp_path / ".models" / "tiny")
    return tmp_path


def asking(wish: str, count: int = 3) -> Trace:
    return workload.generate(
        count,
        arrivals=workload.at_once,
        popularity=workload.identical([wish]),
        prompt_tokens=workload.fixed(5),
        new_tokens=workload.fixed(NUM_NEW),
        vocab_size=99,
    )


def scripted(key: Key, log: Path, tick: Tick) -> Remote:
    del key, tick
    return Remote([sys.executable, "-m", "tests.benchmarks.scripted_worker"], log=log, threads=1)


def scenario(*wishes: str, goals: tuple[Goal, ...] = (at_least(1.5, 3.0), at_most(0.4, 0.1, "step_ms"))) -> Scenario:
    """Sides of one backend each, the first of which serves."""
    others = tuple(Other(Side(backend=wish, trace=asking(wish)), goals) for wish in wishes)
    return Scenario(
        name="scripted", what="three requests", ours=Side(backend="ours", trace=asking("serves")), others=others
    )


def measure(one: Scenario, folder: Path, turns: int = 2) -> tuple[ScenarioResult, list[tuple[str, int]]]:
    ticks: list[tuple[str, int]] = []
    with Bench(lambda text, runs: ticks.append((text, runs)), folder=folder, start=scripted) as bench:
        return bench.measure(replace(one, model="tiny"), turns), ticks


def test_known_numbers(folder: Path) -> None:
    """A token a second beside one in two: 3 · 4 tokens in 4 s, 12 in 8 s."""
    found, ticks = measure(scenario("is slow"), folder)
    ours, slow = found.sides
    assert ours.numbers["output_tokens_per_s"].turns == (3.0, 3.0)
    assert slow.numbers["output_tokens_per_s"].turns == (1.5, 1.5)
    assert slow.numbers["step_ms"].median == 2000
    assert slow.numbers["ttft_p50_ms"].median == 2000
    assert slow.versions == {"adapters": "0", "threads": "1"}
    assert slow.notes == {"client_cpu_s": 0.5}
    assert slow.same_first_tokens is None, "they were not asked the same"
    speed, step = found.ratios
    assert speed.ratio is not None
    assert step.ratio is not None
    assert (speed.ratio.median, speed.verdict) == (2.0, "met")
    assert (step.ratio.median, step.verdict) == (0.5, "missed")
    assert sum(runs for _, runs in ticks) == (2 + 1) * 2, "the bar ends at its end"


def test_sides_take_turns(folder: Path) -> None:
    _, ticks = measure(scenario("is slow"), folder)
    begun = [text for text, runs in ticks if not runs]
    assert begun == [
        "scripted: making what it holds",
        "scripted: ours, warm",
        "scripted: is slow, warm",
        "scripted: ours, turn 1 of 2",
        "scripted: is slow, turn 1 of 2",
        "scripted: ours, turn 2 of 2",
        "scripted: is slow, turn 2 of 2",
    ]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("dies", "died with exit code 7"),
        ("breaks", "no such kernel"),
        ("cannot", "it has no such adapters"),
        ("is short", "answers of"),
    ],
)
def test_who_fails_is_left_out_and_says_why(folder: Path, wish: str, expected: str) -> None:
    found, _ = measure(scenario(wish, "is slow"), folder)
    ours, broken, slow = found.sides
    assert expected in broken.failure
    assert not broken.numbers
    assert not ours.failure
    assert not slow.failure
    verdicts = [ratio.verdict for ratio in found.ratios]
    assert verdicts == ["not measured", "not measured", "met", "missed"]
    entry = results.entry(found, {"cpu": "a chip"}, "a command")
    lines = results.cells([entry])[1:]
    assert [line[-1] for line in lines] == verdicts
    assert lines[0][4:6] == ["–", "–"]
    assert any(expected in line for line in results.failures([entry]))


def test_a_backend_that_nobody_knows(folder: Path) -> None:
    with Bench(lambda text, runs: None, folder=folder) as bench:
        found = bench.measure(replace(scenario(), ours=Side(backend="nobody", trace=asking("serves")), model="tiny"), 1)
    assert found.sides[0].failure.startswith("it is not one of weft, ")


@pytest.mark.slow
def test_weft_and_peft(folder: Path) -> None:
    """Two LoRAs and lengths of their own, over gRPC, in process and in PEFT's static batch."""
    hold = Hold(lora_of(4), 2)
    trace = workload.generate(
        4,
        arrivals=workload.at_once,
        popularity=workload.distinct(hold.ids),
        prompt_tokens=workload.between(3, 9),
        new_tokens=workload.between(2, 5),
        vocab_size=models.VOCAB_SIZE,
    )
    weft = Side(backend="weft", trace=trace, holds=(hold,))
    others = tuple(Other(replace(weft, backend=name), (Goal(),)) for name in ("weft-in-process", "peft"))
    one = Scenario(name="tiny", what="four requests", ours=weft, others=others, model="tiny", max_model_len=64)
    with Bench(lambda text, runs: None, folder=folder) as bench:
        found = bench.measure(one, 1)
    assert [side.failure for side in found.sides] == ["", "", ""]
    assert [side.same_first_tokens for side in found.sides] == [None, 4, 4]
    for side in found.sides:
        assert side.numbers["output_tokens_per_s"].median > 0
        assert side.numbers["ttft_p50_ms"].median > 0
    assert found.sides[0].versions.keys() == {"weft", "torch", "transformers", "grpcio"}
    assert not list((folder / ".runs").glob("*/*.jsonl")), "traces go when the bench ends"
