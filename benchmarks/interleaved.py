"""Measures the sides of a scenario in turns, each in a worker process, so that drift of the machine falls on all alike.

A worker lives as long as consecutive scenarios need it, so sides that hold the same share one process. A side that
fails is left out from there on; the others go on.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks import environments, metrics, models, workload
from benchmarks.backends.catalog import BACKENDS
from benchmarks.backends.remote import Failed, Remote
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome
from benchmarks.metrics import Spread
from benchmarks.scenarios import Goal, Scenario, Side

HERE = Path(__file__).resolve().parent
_LOAD_LIMIT_S = 600.0
_RUN_LIMIT_S = 600.0
_NUM_WARM_TOKENS = 8
_SLOT_SHARE = 1.02  # size relative to the adapter's file: slots align each matrix to 64 bytes


class Key(NamedTuple):
    """Identity of a worker: sides with equal keys share one."""

    backend: str
    spec: LoadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A side over its turns; `failure` gives the reason for missing turns.

    notes: medians of the numbers that the backend gave beside its records.
    same_first_tokens: number of requests whose first token was ours, if both sides report tokens for equal requests.
    """

    label: str
    backend: str
    failure: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Spread] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    same_first_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Ours ÷ another side's number, turn by turn; None if one of them has none."""

    beside: str
    goal: Goal
    ratio: Spread | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.ratio is None else self.goal.verdict(self.ratio.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """A measured scenario; ours is the first of `sides`."""

    scenario: Scenario
    turns: int
    sides: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]


Tick = Callable[[str, int], None]
"""A function called with what is running, and the number of runs that ended since the last call."""

Start = Callable[[Key, Path, Tick], Remote]
"""A function that starts the worker of a key, with a log at this path."""


def start(key: Key, log: Path, tick: Tick) -> Remote:
    """Start a backend of the catalog in its own environment. Raises Cannot if there is none, and NotMade."""
    if key.backend not in BACKENDS:
        raise Cannot(f"it is not one of {', '.join(BACKENDS)}")
    entry = BACKENDS[key.backend]
    python = environments.python(entry.environment, lambda text: tick(text, 0))
    return Remote([str(python), "-m", f"benchmarks.backends.{entry.module}"], log=log, threads=key.spec.threads)


class Bench:
    """The workers of one call of the suite; leave it as a context manager.

    folder: where models, logs and traces lie, in `.models` and `.runs`.
    """

    def __init__(self, tick: Tick, *, threads: int = 2, folder: Path = HERE, start: Start = start) -> None:
        self._tick = tick
        self._threads = threads
        self._start = start
        self._remotes: dict[Key, Remote] = {}
        self._versions: dict[Key, Mapping[str, str]] = {}
        self._models = folder / ".models"
        self._logs = folder / ".runs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._traces = Path(tempfile.mkdtemp(dir=self._logs))

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._remotes):
            self._close(key)
        shutil.rmtree(self._traces)

    def measure(self, scenario: Scenario, turns: int) -> ScenarioResult:
        """Run the scenario's sides in turn, `turns` times, after a shorter run of each that does not count."""
        self._tick(f"{scenario.name}: making what it holds", 0)
        keys = [self._key(scenario, side) for side in scenario.sides]
        for key in set(self._remotes) - set(keys):
            self._close(key)
        runs = [
            _Runs(scenario.name, number, side, key)
            for number, (side, key) in enumerate(zip(scenario.sides, keys, strict=True))
        ]
        for one in runs:
            self._attempt(one, _warm(one.side.trace), "warm")
        for turn in range(1, turns + 1):
            for one in runs:
                outcome = self._attempt(one, one.side.trace, f"turn {turn} of {turns}")
                if outcome is not None:
                    one.outcomes.append(outcome)
        sides = tuple(self._measured(one, runs[0]) for one in runs)
        return ScenarioResult(scenario=scenario, turns=turns, sides=sides, ratios=_ratios(scenario, sides))

    def _key(self, scenario: Scenario, side: Side) -> Key:
        adapters = [one for hold in side.holds for one in hold.make(scenario.model, folder=self._models)]
        for hold in side.brings:
            hold.make(scenario.model, folder=self._models)
        device_bytes = None
        if side.device_slots is not None:
            weights = Path(adapters[0][1]) / "adapter_model.safetensors"
            device_bytes = int(side.device_slots * _SLOT_SHARE * weights.stat().st_size)
        spec = LoadSpec(
            model=str(models.base(scenario.model, folder=self._models)),
            adapters=tuple(adapters),
            threads=self._threads,
            max_num_seqs=side.max_num_seqs,
            max_model_len=scenario.max_model_len,
            quantization=scenario.quantization,
            adapter_device_bytes=device_bytes,
        )
        return Key(side.backend, spec)

    def _load(self, key: Key) -> None:
        if key in self._versions:
            return
        self._remotes[key] = self._start(key, self._logs / f"{key.backend}.log", self._tick)
        self._versions[key] = self._remotes[key].load(key.spec, limit_s=_LOAD_LIMIT_S)

    def _attempt(self, one: "_Runs", trace: workload.Trace, what: str) -> Outcome | None:
        """Load the worker and run; None if the side fails or has failed."""
        about = f"{one.scenario}: {label(one.side)}, {what}"
        self._tick(about, 0)
        try:
            return None if one.failure else self._run(one, trace, what)
        except (Cannot, Failed, environments.NotMade) as reason:
            one.failure = str(reason)
            if not isinstance(reason, Cannot):
                self._close(one.key)  # the next use of the key starts a new one
            return None
        finally:
            self._tick(about, 1)

    def _run(self, one: "_Runs", trace: workload.Trace, what: str) -> Outcome:
        self._load(one.key)
        salt = f"{one.scenario} {one.number} {what}"
        path = workload.write(trace, self._traces / f"{salt.replace(' ', '-')}.jsonl")
        return self._remotes[one.key].run(trace, path, salt=salt, limit_s=_RUN_LIMIT_S)

    def _close(self, key: Key) -> None:
        self._versions.pop(key, None)
        remote = self._remotes.pop(key, None)
        if remote is not None:
            remote.close()

    def _measured(self, one: "_Runs", ours: "_Runs") -> Measured:
        found = [metrics.measure(outcome) for outcome in one.outcomes]
        notes = [outcome.notes for outcome in one.outcomes]
        return Measured(
            label=label(one.side),
            backend=one.side.backend,
            failure=one.failure,
            versions=self._versions.get(one.key, {}),
            numbers={name: metrics.spread([turn[name] for turn in found]) for name in found[0]} if found else {},
            notes={name: metrics.spread([turn[name] for turn in notes]).median for name in notes[0]} if notes else {},
            same_first_tokens=_same_first_tokens(one, ours),
        )


@dataclass(slots=True)
class _Runs:
    """The runs of one side so far: the `number`-th of its scenario."""

    scenario: str
    number: int
    side: Side
    key: Key
    failure: str = ""
    outcomes: list[Outcome] = field(default_factory=list)


def label(side: Side) -> str:
    """Return the name of a side in tables."""
    entry = BACKENDS.get(side.backend)
    name = side.backend if entry is None else entry.label
    return f"{name}, {side.label}" if side.label else name


def _warm(trace: workload.Trace) -> workload.Trace:
    """Return the same requests with short answers, and no registrations."""
    requests = [
        workload.Request(
            arrival_s=0.0,
            adapters=request.adapters,
            prompt=request.prompt,
            num_new_tokens=min(request.num_new_tokens, _NUM_WARM_TOKENS),
        )
        for request in trace.requests
    ]
    return workload.Trace(requests=tuple(requests))


def _ratios(scenario: Scenario, sides: Sequence[Measured]) -> tuple[Ratio, ...]:
    ours, *others = sides
    return tuple(
        Ratio(beside=measured.label, goal=goal, ratio=_ratio(ours, measured, goal.metric))
        for other, measured in zip(scenario.others, others, strict=True)
        for goal in other.goals
    )


def _ratio(ours: Measured, other: Measured, metric: str) -> Spread | None:
    if ours.failure or other.failure:
        return None
    pairs = zip(ours.numbers[metric].turns, other.numbers[metric].turns, strict=True)
    return metrics.spread([mine / theirs for mine, theirs in pairs])


def _same_first_tokens(one: _Runs, ours: _Runs) -> int | None:
    if one is ours or not one.outcomes or not ours.outcomes or one.side.trace.requests != ours.side.trace.requests:
        return None
    pairs = list(zip(one.outcomes[0].records, ours.outcomes[0].records, strict=True))
    if not all(theirs.token_ids and mine.token_ids for theirs, mine in pairs):
        return None
    return sum(theirs.token_ids[0] == mine.token_ids[0] for theirs, mine in pairs)
