"""The gain of each fast path: the whole server beside one without it, `make bench-paths`.

Two instances that differ only in the one path (ablations.py) compute the same thing, alternating call by call, so that
other load on the machine falls on both. A turn's gain is the median time without the path ÷ that with it. Answers are
compared first: a path that changes them by more than rounding is refused.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks import ablations, metrics, models, report, results, workload
from benchmarks.ablations import WHOLE, Ablation, plain, without
from benchmarks.backends.weft_grpc import WeftGrpc
from benchmarks.backends.worker import LoadSpec
from benchmarks.fixed_steps import (
    NUM_CONTEXT,
    NUM_PROMPT,
    NUM_ROWS,
    RANK,
    FixedSteps,
    PromptAgain,
    Rows,
    loras,
    loras_at_q,
    mixtures,
    one_lora,
)
from benchmarks.metrics import Spread
from benchmarks.results import Entry
from weft.config import EngineConfig, ModelConfig, Quantization
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.model import loader, paged_attention, serving_form
from weft.model.loader import Base
from weft.model.packed import multiplies_bfloat16
from weft.model.serving_form import Part
from weft_training.demo.document import markdown, table

_MODEL = "bench-80m"
_NUM_STREAMED = 32
_ERROR_MAX = 0.03
_NOTHING = 0.02  # a smaller gain counts as none

Compute = Callable[[], Tensor]
"""A function that computes what is measured, once, and returns its answers."""


class Differs(Exception):
    """A path changes the answers by more than rounding."""


class Line(NamedTuple):
    """A path, by its short name and in words, and the quantity measured. num_calls: of each side in a turn."""

    name: str
    path: str
    what: str
    num_calls: int
    with_it: Callable[["Bench"], Compute]
    without: Callable[["Bench"], Compute]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A measured line. error: relative difference of the two sides' answers."""

    path: str
    what: str
    with_ms: Spread
    without_ms: Spread
    gain: Spread
    error: float

    @property
    def verdict(self) -> str:
        if abs(self.gain.median - 1) < _NOTHING:
            return "nothing"
        return "costs" if self.gain.median < 1 else "gains"


class Bench:
    """Bases, steps and servers of the lines, each made at its first use; leave it as a context manager.

    folder: where models lie.
    """

    def __init__(self, model: str, *, folder: Path = models.FOLDER) -> None:
        paged_attention.register()
        self._path = models.base(model, folder=folder)
        self._bases: dict[tuple[tuple[str, Part], ...], Base] = {}
        self._rows: dict[Callable[[Base], Rows], Rows] = {}
        self._steps: dict[tuple[Ablation, Callable[[Base], Rows]], FixedSteps] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def held(self, ablation: Ablation) -> tuple[Base, Kernels]:
        """Return an ablated base, and the kernels that its runner gets."""
        if ablation.instead not in self._bases:
            config = ModelConfig(path=self._path, quantization=Quantization.NONE, device="cpu", dtype="bfloat16")
            base = loader.load(config, attention=paged_attention.ATTENTION)
            parts = serving_form.parts(_selected(base))
            for name, part in ablation.instead:
                assert name in parts, name
                parts[name] = part
            for part in parts.values():
                part(base)
            self._bases[ablation.instead] = base
        base = self._bases[ablation.instead]
        return base, ablation.kernels(_selected(base))

    def steps(self, ablation: Ablation, rows: Callable[[Base], Rows]) -> FixedSteps:
        """Return steps computed under an ablation."""
        if (ablation, rows) not in self._steps:
            base, kernels = self.held(ablation)
            if rows not in self._rows:
                self._rows[rows] = rows(base)
            self._steps[ablation, rows] = FixedSteps(base, kernels, self._rows[rows])
        return self._steps[ablation, rows]

    def server(self, *options: str) -> WeftGrpc:
        """Return a `weft serve` with these options, and no adapters."""
        started = WeftGrpc(options)
        self._open.callback(started.close)
        started.load(
            LoadSpec(
                model=str(self._path),
                adapters=(),
                threads=torch.get_num_threads(),
                max_num_seqs=NUM_ROWS,
                max_model_len=NUM_CONTEXT + _NUM_STREAMED,
                quantization=Quantization.NONE.value,
                adapter_device_bytes=None,
            )
        )
        return started


def _selected(base: Base) -> Kernels:
    found = select(base.device, base.dtype)
    if found is REFERENCE:
        raise RuntimeError("fast paths: need the kernels for a CPU, and nothing here compiles them")
    return found


# -- quantities ------------------------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """A quantity of FixedSteps. num_calls: in a turn. of: maps the given ablation to the one measured."""

    what: str
    num_calls: int
    compute: Callable[[FixedSteps], Tensor]
    of: Callable[[Ablation], Ablation] = lambda ablation: ablation


DECODE = Quantity(f"decode step, {NUM_ROWS} rows", 5, FixedSteps.decode)
PLAIN = DECODE._replace(what=f"{DECODE.what}, not captured", of=plain)
MIXTURES = DECODE._replace(what=f"decode step, {NUM_ROWS} mixtures of four LoRAs")
MIXTURES_PLAIN = PLAIN._replace(what=f"{MIXTURES.what}, not captured")
ALONE = DECODE._replace(what="decode step, 1 row")
ALONE_PLAIN = PLAIN._replace(what=f"{ALONE.what}, not captured")
PREFILL = Quantity(f"prefill, {NUM_PROMPT:,} tokens", 1, FixedSteps.prefill)


def _of_steps(
    name: str,
    path: str,
    removed: Ablation,
    beside: Ablation = WHOLE,
    *,
    quantities: Sequence[Quantity],
    rows: Callable[[Base], Rows] = loras,
) -> list[Line]:
    """Return a path's lines. beside: the side that has the path."""

    def computing(ablation: Ablation, quantity: Quantity, bench: Bench) -> Compute:
        return partial(quantity.compute, bench.steps(quantity.of(ablation), rows))

    return [
        Line(name, path, one.what, one.num_calls, partial(computing, beside, one), partial(computing, removed, one))
        for one in quantities
    ]


def _prompt_again(bench: Bench, *, caching: bool) -> Compute:
    config = EngineConfig(max_num_seqs=1, enable_prefix_caching=caching)
    return PromptAgain(*bench.held(WHOLE), config).ask


def _streams(bench: Bench, *, options: Sequence[str] = ()) -> Compute:
    """Return runs over gRPC. Answers are token counts: the tokens may depend on which rows shared a step."""
    server, runs = bench.server(*options), count()
    trace = workload.generate(
        NUM_ROWS,
        arrivals=workload.at_once,
        popularity=workload.base_only,
        prompt_tokens=workload.fixed(NUM_CONTEXT),
        new_tokens=workload.fixed(_NUM_STREAMED),
        vocab_size=models.VOCAB_SIZE,
    )

    def run() -> Tensor:
        outcome = server.run(trace, salt=f"{options} {next(runs)}")
        return torch.tensor([float(len(record.token_ids)) for record in outcome.records])

    return run


_ALL = DECODE, PLAIN, PREFILL
_ALONE = ALONE, ALONE_PLAIN
_GROUPS = "q, k and v, gate and up held as one"
STEPS = [
    *_of_steps("captured", "decode steps captured", ablations.UNCAPTURED, quantities=[DECODE]),
    *_of_steps("captured", "decode steps captured", ablations.UNCAPTURED, quantities=[MIXTURES], rows=mixtures),
    *_of_steps("groups", _GROUPS, without("groups", "gates"), without("gates"), quantities=_ALL),
    *_of_steps("groups", _GROUPS, without("groups", "gates"), without("gates"), quantities=_ALONE, rows=one_lora),
    *_of_steps("product", "own packed product, beside torch's", without("packing"), quantities=[DECODE, PREFILL]),
    *_of_steps("onednn", "own packed product, beside oneDNN's", ablations.ONEDNN_PRODUCT, quantities=[DECODE, PREFILL]),
    *_of_steps("norms", "a norm in one call", without("norms"), quantities=_ALL),
    *_of_steps("gates", "a gate in one call", without("gates"), quantities=_ALL),
    *_of_steps(
        "deltas", "kernels of deltas", ablations.REFERENCE_DRIVER, ablations.UNCAPTURED, quantities=[PLAIN, PREFILL]
    ),
    *_of_steps(
        "routers",
        "kernel of routers",
        ablations.TORCH_ROUTERS,
        ablations.UNCAPTURED,
        quantities=[MIXTURES_PLAIN],
        rows=mixtures,
    ),
    *_of_steps(
        "attention",
        "kernel of paged attention",
        ablations.REFERENCE_ATTENTION,
        ablations.UNCAPTURED,
        quantities=[PLAIN, PREFILL],
    ),
    *_of_steps(
        "asked",
        "kernels asked only where rows have something",
        ablations.ASKED_EVERYWHERE,
        quantities=[DECODE, PLAIN],
        rows=loras_at_q,
    ),
    Line(
        "prefix",
        "prefix caching",
        f"first token of a known prompt, {NUM_PROMPT:,} tokens",
        1,
        partial(_prompt_again, caching=True),
        partial(_prompt_again, caching=False),
    ),
]
SERVED = [
    Line(
        "streams",
        "streams sent every 40 ms",
        f"{NUM_ROWS} streams of {_NUM_STREAMED} tokens over gRPC",
        1,
        _streams,
        partial(_streams, options=("--stream-interval-s", "0")),
    ),
]
LINES = [*STEPS, *SERVED]


def measure(line: Line, bench: Bench, turns: int) -> Gain:
    """Measure the sides in turns, after one call of each that does not count. Raises Differs."""
    sides = line.with_it(bench), line.without(bench)
    wanted, given = (side().float().clone() for side in sides)
    error = float((given - wanted).norm() / wanted.norm())
    if not error <= _ERROR_MAX:
        raise Differs(
            f"{line.path}, {line.what}: the answers with and without it differ by {error:.3g}, at most {_ERROR_MAX} "
            "is rounding"
        )
    times = [_turn(sides, line.num_calls, turn) for turn in range(turns)]
    with_ms, without_ms = zip(*times, strict=True)
    return Gain(
        path=line.path,
        what=line.what,
        with_ms=metrics.spread(with_ms),
        without_ms=metrics.spread(without_ms),
        gain=metrics.spread([slow / fast for fast, slow in times]),
        error=error,
    )


def _turn(sides: tuple[Compute, Compute], num_calls: int, turn: int) -> tuple[float, float]:
    """Return both median times in milliseconds; the order alternates from call to call, and from turn to turn."""
    times: tuple[list[float], list[float]] = [], []
    for call in range(turn, turn + num_calls):
        for place in (call % 2, 1 - call % 2):
            begin = time.perf_counter()
            sides[place]()
            times[place].append(1e3 * (time.perf_counter() - begin))
    first, second = (float(np.median(one)) for one in times)
    return first, second


def entry(gain: Gain, turns: int, conditions: Mapping[str, str], command: str) -> Entry:
    """Make an entry for the file."""
    name = f"{gain.path}, {gain.what}"
    found = {"name": name, **asdict(gain), "verdict": gain.verdict, "turns": turns}
    return {**found, "conditions": conditions, "command": command}


HEAD = ["path", "measured", "with, ms", "without, ms", "gain (quartiles)", ""]
NUM_NAMES = 2


def cells(entries: Sequence[Entry]) -> list[list[str]]:
    """Return the table's cells."""
    found = [HEAD]
    for one in entries:
        times = [f"{one[side]['median']:.1f}" for side in ("with_ms", "without_ms")]
        gain = "{median:.2f} × ({q1:.2f}–{q3:.2f})".format(**one["gain"])
        found.append([one["path"], one["what"], *times, gain, one["verdict"]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="turns of each line (default 7)")
    names = dict.fromkeys(line.name for line in LINES)
    parser.add_argument("--only", action="append", default=[], choices=names, help="a path; may be repeated")
    parser.add_argument("--json", type=Path, help="put the lines into this file, which keeps its others")
    parser.add_argument("--table", type=Path, help="write the table of that file's lines here, as Markdown")
    options = parser.parse_args()
    chosen = [line for line in LINES if line.name in (options.only or names)]
    if not multiplies_bfloat16():  # there is no oneDNN product to compare with
        chosen = [line for line in chosen if line.name != "onednn"]
    conditions, command = report.conditions(), shlex.join(["python", "-m", "benchmarks.fast_paths", *sys.argv[1:]])
    entries: list[Entry] = []
    console = Console()
    with Progress(console=console, transient=True) as progress, Bench(_MODEL) as bench:
        task = progress.add_task("", total=len(chosen))
        for line in chosen:
            progress.update(task, description=f"{line.path}, {line.what}")
            entries.append(entry(measure(line, bench, options.turns), options.turns, conditions, command))
            if options.json is not None:
                results.store(entries[-1:], options.json)  # an early end keeps the lines that are done
            progress.advance(task)
    if options.json is not None:
        entries = results.read(options.json)
    title = f"What each fast path gains: {_MODEL}, bfloat16, {NUM_ROWS} LoRAs of rank {RANK}"
    under = "\n".join(
        sorted({f"{report.line(one['conditions'])}, {one['turns']} turns, `{one['command']}`" for one in entries})
    )
    console.print(table(title, cells(entries), num_names=NUM_NAMES))
    console.print(under, highlight=False)
    if options.table is not None:
        options.table.write_text(f"# {title}\n\n{markdown(cells(entries), num_names=NUM_NAMES)}\n\n{under}\n")


if __name__ == "__main__":
    main()
