"""Metrics of known times, verdicts, the file that keeps its rows, the table, the plots."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import metrics, plots, report, results, scenarios, sweeps
from benchmarks.backends.catalog import BACKENDS
from benchmarks.backends.worker import Outcome, Record
from benchmarks.scenarios import Goal, at_least, at_most


def outcome(*records: tuple[float, list[float]]) -> Outcome:
    return Outcome(records=tuple(Record(arrival_s=due, token_s=tuple(times)) for due, times in records))


def test_metrics_of_known_times() -> None:
    """The second request is due at 1 s: its first token takes 0.5 s, and the run lasts from 0 to 4 s."""
    found = metrics.measure(outcome((10.0, [10.1, 10.2, 10.3]), (11.0, [11.5, 12.5, 14.0])))
    assert found["output_tokens_per_s"] == pytest.approx(6 / 4)
    assert found["duration_s"] == pytest.approx(4)
    assert found["ttft_p50_ms"] == pytest.approx(300)
    assert found["ttft_p99_ms"] == pytest.approx(100 + 0.99 * 400)
    assert found["step_ms"] == pytest.approx((100 + 1250) / 2)
    assert found["itl_p50_ms"] == pytest.approx((100 + 1000) / 2)
    assert found["itl_p99_ms"] == pytest.approx(1000 + 500 * 0.97)
    assert set(found) == set(metrics.METRICS)


def test_tokens_that_come_together_are_waited_for_once() -> None:
    found = metrics.measure(outcome((0.0, [1.0, 1.3, 1.3, 1.3, 1.6, 1.6, 1.6])))
    assert found["itl_p50_ms"] == found["itl_p99_ms"] == pytest.approx(300)
    assert found["step_ms"] == pytest.approx(100)


def test_no_gaps_no_step() -> None:
    assert set(metrics.measure(outcome((0.0, [1.0])))) == {
        "output_tokens_per_s",
        "duration_s",
        "ttft_p50_ms",
        "ttft_p90_ms",
        "ttft_p99_ms",
    }


def test_quartiles() -> None:
    assert metrics.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == metrics.Spread(median=3, q1=2, q3=4, turns=(4, 1, 2, 3, 5))
    assert metrics.spread([7.0]) == metrics.Spread(median=7, q1=7, q3=7, turns=(7,))


@pytest.mark.parametrize(
    ("goal", "ratio", "verdict"),
    [
        (at_least(3.0, 4.5), 4.5, "reached"),
        (at_least(3.0, 4.5), 3.0, "met"),
        (at_least(3.0, 4.5), 2.99, "missed"),
        (at_most(1.2, 1.1), 1.1, "reached"),
        (at_most(1.2, 1.1), 1.2, "met"),
        (at_most(1.2, 1.1), 1.21, "missed"),
        (Goal(), 9.0, ""),
    ],
)
def test_verdicts(goal: Goal, ratio: float, verdict: str) -> None:
    assert goal.verdict(ratio) == verdict


def test_what_is_missed_is_told_with_its_reason() -> None:
    def one(name: str, ratio: float) -> dict[str, Any]:
        goal = at_most(1.2, 1.1)
        told = {"beside": "it", "metric": goal.metric, "must": 1.2, "verdict": goal.verdict(ratio)}
        return {"name": name, "what": f"a {name}", "ratios": [told | {"ratio": {"median": ratio}}]}

    limits = {("tax", "duration_s"): "Memory is slow.", ("other", "step_ms"): "Unseen."}
    assert results.misses([one("met", 1.2), one("tax", 1.26), one("other", 1.5)], limits) == [
        "a tax ÷ it, run, s: missed by 5.0%. Memory is slow.",
        "a other ÷ it, run, s: missed by 25.0%",
    ]


def test_limits_are_those_of_rows_and_their_bounds() -> None:
    bounded = {
        (scenario.name, goal.metric)
        for scenario in scenarios.whole()
        for other in scenario.others
        for goal in other.goals
    }
    assert set(scenarios.LIMITS) <= bounded


def entry(name: str, *, tokens_per_s: float = 100.0, point: tuple[str, float] | None = None) -> dict[str, Any]:
    """A row as a file has it, Weft twice as fast as another."""

    def numbers(factor: float) -> dict[str, Any]:
        spread = {"median": factor * tokens_per_s, "q1": factor * tokens_per_s - 1, "q3": factor * tokens_per_s + 1}
        return {metric: spread | {"turns": []} for metric in metrics.METRICS}

    sides = [
        {"label": "Weft", "failure": "", "numbers": numbers(2)},
        {"label": "Other", "failure": "", "numbers": numbers(1)},
    ]
    ratio = {
        "beside": "Other",
        "metric": "output_tokens_per_s",
        "must": 1.5,
        "reach": 3.0,
        "at_least": True,
        "ratio": {"median": 2.0, "q1": 1.9, "q3": 2.1, "turns": []},
        "verdict": "met",
    }
    return {
        "name": name,
        "what": "16 LoRAs",
        "model": "bench-80m",
        "quantization": "none",
        "turns": 5,
        "point": None if point is None else {"axis": point[0], "value": point[1]},
        "sides": sides,
        "ratios": [ratio],
        "conditions": {"cpu": "a chip", "commit": "abc"},
        "command": "a command",
    }


def test_the_table() -> None:
    listed = [entry("one"), entry("two") | {"model": "bench-1b", "quantization": "nf4"}, entry("p", point=("rank", 8))]
    assert results.cells(listed) == [
        ["what", "Weft ÷", "of", "Weft", "other", "ratio (quartiles)", "must", "reach", ""],
        ["16 LoRAs", "Other", "output tokens/s", "200", "100", "2.00 (1.90–2.10)", "≥ 1.5", "≥ 3", "met"],
        [
            "16 LoRAs, bench-1b, NF4",
            "Other",
            "output tokens/s",
            "200",
            "100",
            "2.00 (1.90–2.10)",
            "≥ 1.5",
            "≥ 3",
            "met",
        ],
    ]


def test_a_file_keeps_the_rows_that_were_not_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench.json"
    results.store([entry("one"), entry("two")], path)
    kept = results.store([entry("two", tokens_per_s=50.0)], path)
    assert kept == results.read(path) == [entry("one"), entry("two", tokens_per_s=50.0)]
    assert json.loads(path.read_text())["rows"][0]["conditions"] == {"cpu": "a chip", "commit": "abc"}


def test_plots_draw_the_points_there_are(tmp_path: Path) -> None:
    points = [entry(f"distinct-{n}", tokens_per_s=100 / n, point=("distinct", n)) for n in (1, 2, 4)]
    rates = [entry(f"rate-{n}", point=("rate", n)) for n in (1, 2)]
    drawn = plots.draw([entry("one"), *points, *rates], tmp_path)
    assert [path.name for path in drawn] == ["distinct.svg", "rate.svg"]
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    first = drawn[0].read_bytes()
    plots.draw(points, tmp_path)
    assert drawn[0].read_bytes() == first, "the same rows make the same file"
    plots.draw([*points[:2], entry("distinct-4", tokens_per_s=90, point=("distinct", 4))], tmp_path)
    assert drawn[0].read_bytes() != first


def test_every_row_has_a_name_of_its_own() -> None:
    for listed in (scenarios.short(), [*scenarios.whole(), *sweeps.points()]):
        names = [scenario.name for scenario in listed]
        assert len(set(names)) == len(names)
    assert all(side.backend in BACKENDS for scenario in scenarios.short() for side in scenario.sides)


def test_rows_are_chosen_by_name() -> None:
    assert [scenario.name for scenario in scenarios.named(scenarios.whole(), ["grpc", "base"])] == ["base", "grpc"]
    assert len(scenarios.named(scenarios.whole(), [])) == len(scenarios.whole())
    with pytest.raises(ValueError, match=r"only: must be one of .*, given 'fast'"):
        scenarios.named(scenarios.whole(), ["fast"])


def test_sides_of_a_row_answer_the_same_lengths() -> None:
    """What a ratio compares has the same prompts and answers, whatever the adapters."""
    for scenario in scenarios.whole():
        lengths = [[(len(one.prompt), one.num_new_tokens) for one in side.trace.requests] for side in scenario.sides]
        assert all(one == lengths[0] for one in lengths), scenario.name


def test_the_conditions_name_the_machine_and_the_commit() -> None:
    found = report.conditions("numpy")
    assert {"cpu", "cores", "threads", "torch", "numpy", "commit", "day"} == set(found)
    assert f"{found['cores']} cores, {found['threads']} threads, torch {found['torch']}" in report.line(found)
