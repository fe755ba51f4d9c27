"""The metrics of a run.

A reader waits from one arrival to the next, however many tokens come with it: these times are pooled over the requests
of a run. The time of a step is that of a token after the first: the average of a request, the median over requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from benchmarks.backends.worker import Outcome


class Metric(NamedTuple):
    """A number as tables show it."""

    label: str
    digits: int = 1


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "output_tokens_per_s": Metric("output tokens/s", 0),
        "duration_s": Metric("run, s", 2),
        "step_ms": Metric("step, ms"),
        "itl_p50_ms": Metric("p50 between tokens, ms"),
        "itl_p90_ms": Metric("p90 between tokens, ms"),
        "itl_p99_ms": Metric("p99 between tokens, ms"),
        "ttft_p50_ms": Metric("p50 first token, ms"),
        "ttft_p90_ms": Metric("p90 first token, ms"),
        "ttft_p99_ms": Metric("p99 first token, ms"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles of a number over the turns, and the turns."""

    median: float
    q1: float
    q3: float
    turns: tuple[float, ...]


def measure(outcome: Outcome) -> dict[str, float]:
    """Return the METRICS of a run; those of times between tokens only if a request has two tokens."""
    began_s = min(record.arrival_s for record in outcome.records)
    duration_s = max(record.token_s[-1] for record in outcome.records) - began_s
    num_tokens = sum(len(record.token_s) for record in outcome.records)
    first_ms = [1e3 * (record.token_s[0] - record.arrival_s) for record in outcome.records]
    found = {"output_tokens_per_s": num_tokens / duration_s, "duration_s": duration_s}
    found |= _percentiles(first_ms, {"ttft_p50_ms": 50, "ttft_p90_ms": 90, "ttft_p99_ms": 99})
    between_ms = 1e3 * np.concatenate([np.diff(np.unique(record.token_s)) for record in outcome.records])
    if len(between_ms):
        found |= _percentiles(between_ms, {"itl_p50_ms": 50, "itl_p90_ms": 90, "itl_p99_ms": 99})
        spans = [(record.token_s[-1] - record.token_s[0], len(record.token_s) - 1) for record in outcome.records]
        found["step_ms"] = float(np.median([1e3 * span_s / steps for span_s, steps in spans if steps]))
    return found


def spread(turns: Sequence[float]) -> Spread:
    """Return median and quartiles of at least one turn."""
    q1, median, q3 = np.percentile(turns, [25, 50, 75]).tolist()
    return Spread(median=median, q1=q1, q3=q3, turns=tuple(turns))


def _percentiles(values: Sequence[float] | np.ndarray, wanted: Mapping[str, int]) -> dict[str, float]:
    return dict(zip(wanted, np.percentile(values, list(wanted.values())).tolist(), strict=True))
