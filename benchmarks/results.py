"""The suite's results: one JSON file of rows, each with the conditions of its measurement, and a table.

An existing file keeps the rows that are not measured again, so the whole can be made in several calls.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.interleaved import ScenarioResult
from benchmarks.metrics import METRICS

Entry = Mapping[str, Any]
"""A row as it is in the file."""

DEFAULT_MODEL = "bench-80m"
"""The model that the table does not name, if it is in bfloat16."""


def entry(result: ScenarioResult, conditions: Mapping[str, str], command: str) -> Entry:
    """Make a row for the file."""
    scenario, ours = result.scenario, result.scenario.ours
    return {
        "name": scenario.name,
        "what": scenario.what,
        "model": scenario.model,
        "quantization": scenario.quantization,
        "num_requests": len(ours.trace.requests),
        "num_prompt_tokens": sum(len(request.prompt) for request in ours.trace.requests),
        "num_new_tokens": ours.trace.num_new_tokens,
        "turns": result.turns,
        "point": None if scenario.point is None else scenario.point._asdict(),
        "sides": [asdict(side) for side in result.sides],
        "ratios": [
            {
                "beside": ratio.beside,
                **asdict(ratio.goal),
                "ratio": None if ratio.ratio is None else asdict(ratio.ratio),
                "verdict": ratio.verdict,
            }
            for ratio in result.ratios
        ],
        "conditions": dict(conditions),
        "command": command,
    }


def store(entries: Sequence[Entry], path: Path) -> list[Entry]:
    """Put rows into a file in place of those of the same names; return all rows of the file."""
    known = {one["name"]: one for one in read(path)} if path.exists() else {}
    known |= {one["name"]: one for one in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": list(known.values())}, indent=1) + "\n")
    return list(known.values())


def read(path: Path) -> list[Entry]:
    """Return the rows of a file."""
    return json.loads(path.read_text())["rows"]


HEAD = ["what", "Weft ÷", "of", "Weft", "other", "ratio (quartiles)", "must", "reach", ""]
NUM_NAMES = 3


def cells(entries: Sequence[Entry]) -> list[list[str]]:
    """Return the table, with a line for each ratio; points of plots have none."""
    found = [HEAD]
    for one in entries:
        if one["point"] is not None:
            continue
        ours, others = one["sides"][0], {side["label"]: side for side in one["sides"][1:]}
        for ratio in one["ratios"]:
            found.append(_line(one, ours, others[ratio["beside"]], ratio))
    return found


def failures(entries: Sequence[Entry]) -> list[str]:
    """Report why sides are missing from the table, a line each."""
    return [
        f"{one['name']}, {side['label']}: {side['failure']}"
        for one in entries
        for side in one["sides"]
        if side["failure"]
    ]


def misses(entries: Sequence[Entry], limits: Mapping[tuple[str, str], str]) -> list[str]:
    """Report by how much bounds were missed, and the obstacle to each, a line each.

    limits: the obstacle to a bound, by row and metric.
    """
    found = []
    for one in entries:
        for ratio in one["ratios"]:
            if ratio["verdict"] == "missed":
                share = abs(ratio["ratio"]["median"] / ratio["must"] - 1)
                text = f"{one['what']} ÷ {ratio['beside']}, {METRICS[ratio['metric']].label}: missed by {share:.1%}"
                limit = limits.get((one["name"], ratio["metric"]))
                found.append(f"{text}. {limit}" if limit else text)
    return found


def _line(one: Entry, ours: Entry, other: Entry, ratio: Entry) -> list[str]:
    other_than = [one["model"]] if one["model"] != DEFAULT_MODEL else []
    other_than += [one["quantization"].upper()] if one["quantization"] != "none" else []
    what = ", ".join([one["what"], *other_than])
    sign = "≥" if ratio["at_least"] else "≤"
    bounds = ["" if ratio[bound] is None else f"{sign} {ratio[bound]:g}" for bound in ("must", "reach")]
    metric = METRICS[ratio["metric"]]
    numbers = [_number(side, ratio["metric"], metric.digits) for side in (ours, other)]
    shown = "–"
    if ratio["ratio"] is not None:
        spread = ratio["ratio"]
        shown = f"{spread['median']:.2f} ({spread['q1']:.2f}–{spread['q3']:.2f})"
    return [what, ratio["beside"], metric.label, *numbers, shown, *bounds, ratio["verdict"]]


def _number(side: Entry, metric: str, digits: int) -> str:
    return f"{side['numbers'][metric]['median']:.{digits}f}" if metric in side["numbers"] else "–"
