"""Rows G1 to G10 on one NVIDIA GPU, each beside the bound that the device's own bandwidth sets.

    python -m benchmarks.gpu                       # Llama-3.1-8B's shape on CUDA, under ten minutes
    python -m benchmarks.gpu --shape tiny --device cpu

Random weights, made on the spot; greedy; every answer runs to its length; contexts of about 1,000 tokens; the engine in
this process, scheduler and sampler included. Rows for which there is no time left are marked so.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import gpu_peft, report, roofline
from benchmarks.decode_loop import DecodeLoop, Step
from benchmarks.gpu_base import SHAPES, Loras, Shape, make_base
from weft.config import Quantization
from weft.model.loader import Base

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The amount of measuring: everything, or just enough to see that it runs."""

    shape: Shape
    device: torch.device
    prompt: int = 960
    num_steps: int = 48
    rank: int = 16
    num_buffers: int = 64
    num_churned: int = 2000
    num_slots: int = 128
    rows_scale: int = 1  # batch sizes are divided by it
    copy_bytes: int = 4 << 30
    product_size: int = 8192
    budget_s: float = 540.0

    @classmethod
    def of(cls, shape: Shape, device: torch.device, *, budget_s: float) -> "Plan":
        """Return the whole plan for a GPU; on a CPU, or for a tiny model, just enough to see that everything runs."""
        if device.type == "cuda" and shape.name != "tiny":
            return cls(shape=shape, device=device, budget_s=budget_s)
        return cls(
            shape=shape,
            device=device,
            prompt=24,
            num_steps=6,
            rank=2,
            num_buffers=4,
            num_churned=24,
            num_slots=8,
            rows_scale=8,
            copy_bytes=1 << 24,
            product_size=256,
            budget_s=budget_s,
        )

    def rows(self, number: int) -> int:
        """Return a batch size, scaled."""
        return max(1, number // self.rows_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line. value, target, reach, bound: in `unit`. at_most: less is better. note: reason for a missing value."""

    row: str
    what: str
    unit: str
    value: float | None
    target: float
    reach: float
    bound: float | None = None
    at_most: bool = False
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a value."""
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


class Speed(NamedTuple):
    """Speed of decode steps. step_s: the median. busy: the share of the time in which the device computed them."""

    tokens_per_s: float
    step_s: float
    busy: float


class Bench:
    """Bases and engines of one run, made when a row first needs them; only one base exists at a time."""

    def __init__(self, plan: Plan, quantization: Quantization) -> None:
        self.plan = plan
        self.nf4 = quantization
        self._base: tuple[Quantization, Base, Loras] | None = None
        self._speeds: dict[tuple[Quantization, int, int], Speed] = {}

    @cached_property
    def device(self) -> roofline.Device:
        """The measured rates of the device."""
        return roofline.measure(self.plan.device, copy_bytes=self.plan.copy_bytes, product_size=self.plan.product_size)

    def base(self, quantization: Quantization) -> tuple[Base, Loras]:
        """Return a base in this quantization, and LoRAs for it; a base in another one is freed first."""
        if self._base is None or self._base[0] is not quantization:
            self.forget()
            base = make_base(self.plan.shape, self.plan.device, quantization)
            loras = Loras(base.shape, self.plan.device, rank=self.plan.rank, num_buffers=self.plan.num_buffers)
            self._base = quantization, base, loras
        return self._base[1:]

    def forget(self) -> None:
        """Free the memory."""
        self._base = None
        gc.collect()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()

    def loop(self, quantization: Quantization, *, rows: int, num_slots: int) -> DecodeLoop:
        """Return a new engine."""
        base, loras = self.base(quantization)
        length = self.plan.prompt + 8 * self.plan.num_steps
        return DecodeLoop(base, loras, max_num_seqs=rows, num_slots=num_slots, max_model_len=length)

    def prompt(self, seed: int) -> list[int]:
        """Return token ids that differ for every seed."""
        dice = random.Random(seed)
        return [dice.randrange(1, self.plan.shape.vocab_size) for _ in range(self.plan.prompt)]

    def speed(self, quantization: Quantization, *, rows: int, distinct: int) -> Speed:
        """Return the speed of steps of `rows` decode rows.

        distinct: number of adapters that take turns; 0 is the base alone.
        """
        key = quantization, rows, distinct
        if key not in self._speeds:
            loop = self.loop(quantization, rows=rows, num_slots=max(1, distinct))
            try:
                adapters = [index % distinct if distinct else -1 for index in range(rows)]
                steps = decode(loop, adapters, self.prompt, self.plan.num_steps)
            finally:
                loop.close()
            seconds = sum(step.seconds for step in steps)
            busy = sum(step.device_s for step in steps) / seconds
            tokens = sum(step.num_tokens for step in steps)
            self._speeds[key] = Speed(tokens / seconds, statistics.median(s.seconds for s in steps), busy)
        return self._speeds[key]

    def bound(self, quantization: Quantization, *, rows: int, distinct: int) -> float:
        """Return the tokens/s that the roofline allows."""
        base, loras = self.base(quantization)
        context = self.plan.prompt + self.plan.num_steps
        return roofline.bound(
            self.device,
            roofline.work_of(base),
            rows=rows,
            context=context,
            adapter_bytes=distinct * loras.size_bytes,
        )


def decode(loop: DecodeLoop, adapters: Sequence[int], prompt: Callable[[int], list[int]], num_steps: int) -> list[Step]:
    """Return steps in which every request decodes; prompts and the first steps, which are captured, do not count."""
    for index, adapter in enumerate(adapters):
        loop.submit(adapter, prompt(index), 4 * num_steps)
    loop.run(until=lambda: loop.all_have(3))
    most = max(map(len, loop.tokens_at.values()))
    steps = loop.run(until=lambda: max(map(len, loop.tokens_at.values())) >= most + num_steps)
    loop.clear()
    return steps


# -- the rows ----------------------------------------------------------------------------------------------------------

Row = Callable[[Bench], list[Result]]


def _throughput(
    bench: Bench, row: str, quantization: Quantization, *, rows: int, distinct: int, target: float, reach: float
) -> Result:
    rows, distinct = bench.plan.rows(rows), min(distinct, bench.plan.rows(max(1, distinct)))
    speed = bench.speed(quantization, rows=rows, distinct=distinct)
    held = "bf16" if quantization is Quantization.NONE else quantization.value
    return Result(
        row=row,
        what=f"{rows} rows, {distinct or 'no'} distinct LoRAs, {held}",
        unit="tok/s",
        value=speed.tokens_per_s,
        target=target,
        reach=reach,
        bound=bench.bound(quantization, rows=rows, distinct=distinct),
        details={"step_ms": 1e3 * speed.step_s, "busy": speed.busy},
    )


def single(bench: Bench) -> list[Result]:
    """Measure G1, G2: one request."""
    return [
        _throughput(bench, "G1", bench.nf4, rows=1, distinct=0, target=300, reach=500),
        _throughput(bench, "G2", bench.nf4, rows=1, distinct=1, target=230, reach=380),
    ]


def many(bench: Bench) -> list[Result]:
    """Measure G3, G5: a LoRA for each of many requests, on the quantized base."""
    return [
        _throughput(bench, "G3", bench.nf4, rows=32, distinct=32, target=3000, reach=6500),
        _throughput(bench, "G5", bench.nf4, rows=128, distinct=128, target=6000, reach=7500),
    ]


def tax(bench: Bench) -> list[Result]:
    """Measure G6: the time that LoRAs add to a step of 32 rows."""
    rows = bench.plan.rows(32)
    alone = bench.speed(bench.nf4, rows=rows, distinct=0)
    results = []
    for distinct, target, reach in ((1, 15.0, 6.0), (rows, 28.0, 15.0)):
        taxed = bench.speed(bench.nf4, rows=rows, distinct=distinct)
        floor = bench.bound(bench.nf4, rows=rows, distinct=0) / bench.bound(bench.nf4, rows=rows, distinct=distinct)
        results.append(
            Result(
                row="G6",
                what=f"LoRA tax, {rows} rows, {distinct} distinct",
                unit="%",
                value=100 * (taxed.step_s / alone.step_s - 1),
                target=target,
                reach=reach,
                bound=100 * (floor - 1),
                at_most=True,
            )
        )
    return results


def flatness(bench: Bench) -> list[Result]:
    """Measure G7: many registered adapters, drawn uniformly, more than the device has room for, against eight."""
    plan, rows = bench.plan, bench.plan.rows(32)
    speeds = []
    for registered in (8, plan.num_churned):
        dice = random.Random(3)
        loop = bench.loop(bench.nf4, rows=rows, num_slots=plan.num_slots)
        try:
            for index in range(3 * rows):  # so that requests with other adapters take places over
                loop.submit(dice.randrange(registered), bench.prompt(index), plan.num_steps + index % 7)
            steps = loop.run(until=lambda loop=loop: loop.num_unfinished() == 0)
        finally:
            loop.close()
        speeds.append(sum(step.num_tokens for step in steps) / sum(step.seconds for step in steps))
    return [
        Result(
            row="G7",
            what=f"{plan.num_churned} registered, {plan.num_slots} slots ÷ 8 registered, prompts included",
            unit="ratio",
            value=speeds[1] / speeds[0],
            target=0.92,
            reach=0.97,
            bound=1.0,
        )
    ]


def cold(bench: Bench) -> list[Result]:
    """Measure G8: a request whose adapter is in host memory only, among others that decode."""
    plan, rows = bench.plan, bench.plan.rows(32)
    loop = bench.loop(bench.nf4, rows=rows + 1, num_slots=plan.num_slots)
    first_tokens: dict[bool, list[float]] = {False: [], True: []}
    try:
        for index in range(rows):
            loop.submit(index % plan.rows(8), bench.prompt(index), 8 * plan.num_steps)
        loop.run(until=lambda: loop.all_have(2))
        quiet = [step.seconds for step in loop.run(until=_steps(loop, plan.num_steps // 2))]
        during: list[float] = []
        new = plan.rows(8)
        for turn in range(6):
            for is_cold in (False, True):
                adapter = new if is_cold else 0
                new += is_cold
                begin = time.perf_counter()
                name = loop.submit(adapter, bench.prompt(0)[:16], 2)
                steps = loop.run(until=lambda name=name: len(loop.tokens_at[name]) >= 2)
                if turn:
                    first_tokens[is_cold].append(loop.tokens_at[name][0] - begin)
                    during += [step.seconds for step in steps] if is_cold else []
    finally:
        loop.close()
    extra_ms = 1e3 * (statistics.median(first_tokens[True]) - statistics.median(first_tokens[False]))
    _, loras = bench.base(bench.nf4)
    return [
        Result(
            row="G8",
            what=f"cold adapter of {loras.size_bytes / 1e6:.0f} MB: extra time to first token",
            unit="ms",
            value=extra_ms,
            target=10.0,
            reach=3.0,
            at_most=True,
        ),
        Result(
            row="G8",
            what="the others' slowest step meanwhile ÷ their slowest without",
            unit="ratio",
            value=max(during) / max(quiet),
            target=1.2,
            reach=1.05,
            at_most=True,
        ),
    ]


def _steps(loop: DecodeLoop, count: int) -> Callable[[], bool]:
    begin = max(map(len, loop.tokens_at.values()))
    return lambda: max(map(len, loop.tokens_at.values())) >= begin + count


def busy(bench: Bench) -> list[Result]:
    """Measure G9: the device's share of the time of decode steps."""
    rows = bench.plan.rows(32)
    share = bench.speed(bench.nf4, rows=rows, distinct=rows).busy
    note = "" if bench.plan.device.type == "cuda" else "a CPU is not asked"
    return [
        Result(
            row="G9",
            what=f"device busy, {rows} rows, {rows} distinct",
            unit="%",
            value=None if note else 100 * share,
            target=95.0,
            reach=99.0,
            bound=100.0,
            note=note,
        )
    ]


def peft(bench: Bench) -> list[Result]:
    """Measure G10: against PEFT's mixed batch."""
    plan, rows = bench.plan, bench.plan.rows(32)
    ours = bench.speed(bench.nf4, rows=rows, distinct=rows).tokens_per_s
    blank = partial(
        Result, row="G10", what=f"÷ PEFT mixed batch, {rows} distinct", unit="ratio", target=15.0, reach=40.0
    )
    if find_spec("peft") is None:
        return [blank(value=None, note="peft is not installed")]
    bench.forget()
    theirs = gpu_peft.tokens_per_s(
        plan.shape,
        plan.device,
        bench.nf4,
        num_rows=rows,
        rank=plan.rank,
        prompt=plan.prompt,
        num_steps=min(8, plan.num_steps),
    )
    return [blank(value=ours / theirs, details={"peft_tok_s": theirs})]


def unquantized(bench: Bench) -> list[Result]:
    """Measure G4, G5: the linear weights held in bf16, as a shadow of all of them holds them."""
    return [
        _throughput(bench, "G4", Quantization.NONE, rows=64, distinct=64, target=5500, reach=7500),
        _throughput(bench, "G5", Quantization.NONE, rows=128, distinct=128, target=8000, reach=10500),
    ]


ROWS: tuple[Row, ...] = (single, many, tax, busy, cold, flatness, unquantized, peft)


# -- the run -----------------------------------------------------------------------------------------------------------


def run(plan: Plan, quantization: Quantization, console: Console) -> tuple[roofline.Device, list[Result]]:
    """Measure every row, in order, while there is time."""
    began = time.monotonic()
    bench = Bench(plan, quantization)
    results: list[Result] = []
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("rows", total=len(ROWS))
        for row in ROWS:
            progress.update(task, description=(row.__doc__ or "").partition(".")[0])
            if time.monotonic() - began > plan.budget_s:
                results.append(_not_run(row, "no time was left"))
            else:
                try:
                    results += row(bench)
                except Exception as error:  # the other rows stay valid
                    console.print_exception()
                    results.append(_not_run(row, f"{type(error).__name__}: {error}"))
            progress.advance(task)
    return bench.device, sorted(results, key=lambda result: int(result.row[1:]))


def _not_run(row: Row, why: str) -> Result:
    name, _, what = (row.__doc__ or "").partition(":")
    return Result(row=name.partition(",")[0], what=what.strip(), unit="", value=None, target=0.0, reach=0.0, note=why)


def quantization_on(device: torch.device) -> tuple[Quantization, str]:
    """Return NF4 if bitsandbytes computes it on this device; else none, and the reason."""
    try:
        from bitsandbytes import functional as bnb

        bnb.quantize_4bit(torch.ones(64, 64, dtype=torch.bfloat16, device=device), quant_type="nf4")
    except Exception as error:
        return Quantization.NONE, f"bitsandbytes does not run here ({error}); the base is held in bf16"
    return Quantization.NF4, ""


def fitting(shape: Shape, device: torch.device, quantization: Quantization) -> Shape:
    """Return the shape, or a smaller one if a bf16 base of it would not fit together with what is measured on it."""
    if quantization is Quantization.NF4 or shape.name != "8b" or device.type != "cuda":
        return shape
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return shape if free_bytes > 60 << 30 else SHAPES["1b"]


def table(results: Sequence[Result], *, judged: bool) -> str:
    """Return a Markdown table. judged: whether the targets apply to what was measured."""
    lines = ["| row | what | value | target | reach | bound here | met |", "|---|---|---|---|---|---|---|"]
    for result in results:
        if result.value is None:
            lines.append(f"| {result.row} | {result.what} | not measured: {result.note} | | | | |")
            continue
        sign = "≤" if result.at_most else "≥"
        bound = "" if result.bound is None else f"{result.bound:,.4g}"
        lines.append(
            f"| {result.row} | {result.what} | {result.value:,.4g} {result.unit} | {sign} {result.target:,g} "
            f"| {sign} {result.reach:,g} | {bound} | {('no', 'yes')[bool(result.is_met)] if judged else 'not judged'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 if no row gave a value."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row begins later than this")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/gpu-<device>.json")
    given = parser.parse_args(arguments)
    console = Console()
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print("no CUDA device; `--shape tiny --device cpu` shows that the benchmark runs")
        return 1
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    quantization, why = quantization_on(device)
    if why:
        console.print(f"[yellow]{why}[/yellow]")
    plan = Plan.of(fitting(SHAPES[given.shape], device, quantization), device, budget_s=60 * given.minutes)
    seen, results = run(plan, quantization, console)
    conditions = {
        **report.conditions("transformers", "bitsandbytes"),
        "device": seen.name,
        "shape": plan.shape.name,
        "python": platform.python_version(),
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if arguments is None else arguments),
    }
    console.print(
        f"{seen.name}: copies {seen.bytes_per_s / 1e12:.3g} TB/s (read and written), "
        f"multiplies {seen.flops_per_s / 1e12:.3g} TFLOP/s in bf16"
    )
    judged = plan.shape.name == "8b" and device.type == "cuda"
    print(table(results, judged=judged))
    path = given.output or RESULTS / f"gpu-{seen.name.lower().replace(' ', '-')}.json"
    written = {
        "conditions": conditions,
        "measured": seen._asdict(),
        "rows": [{**asdict(result), "is_met": result.is_met if judged else None} for result in results],
    }
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    console.print(f"written to {path}")
    return 0 if any(result.value is not None for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
