"""The plots of a result file: for each axis that has points, throughput and step time, or latencies over the rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.metrics import METRICS
from benchmarks.results import Entry

_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "distinct": "distinct LoRAs among 16 requests (rank 8)",
        "registered": "registered LoRAs, 128 requests over them (rank 8)",
        "rank": "rank of 16 distinct LoRAs",
        "batch": "requests at once, each with its own LoRA (rank 8)",
        "context": "prompt tokens, 16 distinct LoRAs (rank 8)",
        "rate": "requests per second over 16 LoRAs (rank 8)",
    }
)
_SPEEDS = ("output_tokens_per_s", "step_ms")
_LATENCIES = ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms"), ("itl_p50_ms", "itl_p90_ms", "itl_p99_ms")
_STYLES = ("-", "--", ":")


def draw(entries: Sequence[Entry], folder: Path) -> list[Path]:
    """Write one SVG file for each axis, with the quartiles of the turns as bars."""
    matplotlib.rcParams["svg.hashsalt"] = "weft"  # makes the file depend only on its rows
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for axis, label in _LABELS.items():
        points = [one for one in entries if one["point"] is not None and one["point"]["axis"] == axis]
        if points:
            path = folder / f"{axis}.svg"
            _figure(axis, label, points).savefig(path, metadata={"Date": None})
            found.append(path)
    return found


def _figure(axis: str, label: str, points: Sequence[Entry]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = [(name,) for name in _SPEEDS] if axis != "rate" else _LATENCIES
    for place, names in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for name, style in zip(names, _STYLES, strict=False):
            _lines(axes, points, name, style, with_metric=len(names) > 1)
        axes.set_xlabel(label)
        axes.set_ylabel(METRICS[names[0]].label if len(names) == 1 else "ms")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({one["point"]["value"] for one in points}))
        axes.xaxis.set_major_formatter("{x:g}")
        if len(names) > 1:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _lines(axes: Axes, points: Sequence[Entry], metric: str, style: str, *, with_metric: bool) -> None:
    """Draw one line for each side that has numbers, in the order of the sides."""
    labels = list(dict.fromkeys(side["label"] for one in points for side in one["sides"]))
    for number, label in enumerate(labels):
        values = sorted(
            (one["point"]["value"], side["numbers"][metric])
            for one in points
            for side in one["sides"]
            if side["label"] == label and metric in side["numbers"]
        )
        if not values:
            continue
        x = [value for value, _ in values]
        y = [spread["median"] for _, spread in values]
        errors = [[s["median"] - s["q1"] for _, s in values], [s["q3"] - s["median"] for _, s in values]]
        name = f"{label}, {METRICS[metric].label}" if with_metric else label
        axes.errorbar(x, y, errors, fmt="o", linestyle=style, color=f"C{number}", capsize=3, markersize=4, label=name)
