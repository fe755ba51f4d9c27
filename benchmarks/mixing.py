"""The cost of mixing: step times of compositions and mixtures beside plain LoRAs, `python -m benchmarks.mixing`.

Requests decode in lockstep on `bench-80m`, with the engine driven in process: over gRPC the differences below drown in
other load on the machine. The step time is the time from a request's first token to its last ÷ the steps between them.
The kinds of batches take turns (A, B, C, A, B, C …), so that a ratio holds although the machine's speed drifts. The
cost of eight rows without adapters beside eight with them is the difference to those eight alone; their cost by
themselves is the difference between sixteen and eight rows of the base.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import models, report
from benchmarks.engine_loop import EngineLoop, Held, digest_of
from benchmarks.models import Hold, lora_of, prompts
from weft.adapters.identifiers import AdapterId
from weft.config import ModelConfig, Quantization, WeftConfig
from weft.engine.request import AdapterUse, MixtureUse, canonical
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape
from weft_training.demo.document import table

_MODEL = "bench-80m"
_BATCH = 16
_NUM_PROMPT = 64
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of a row: none is the base, several are a composition, or the experts of a mixture."""

    uses: tuple[AdapterUse, ...] = ()
    mixture: MixtureUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A batch, and the kind it is measured against; "" for none."""

    name: str
    rows: Sequence[Adapters]
    beside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One kind of batch. Milliseconds; `ratio` is the median over the turns of its time ÷ that of `beside`."""

    batch: str
    step_ms: float
    beside: str
    ratio: float | None
    turns_ms: list[float]


BASE, LARGE, SMALL = "16 base", "16 LoRAs, rank 32", "16 LoRAs, rank 8"
COMPOSED, MIXED = "16 compositions of 4 LoRAs, rank 8", "16 mixtures of 4 LoRAs, rank 8, top 2"
HALF_BASE, HALF_MIXED, BOTH = "8 base", "4 compositions, 4 mixtures", "4 compositions, 4 mixtures, 8 base"


def _kinds(small: Sequence[Held], large: Sequence[Held], mixtures: Sequence[Adapters]) -> list[Kind]:
    """Return all kinds. small: 4 × 16 LoRAs of rank 8; large: 16 of rank 32; mixtures: 16, each of 4 small ones."""
    plain = [Adapters((one.use(),)) for one in small[:_BATCH]]
    composed = [Adapters(canonical(one.use(1 / _PARTS) for one in _parts(small, row))) for row in range(_BATCH)]
    half = [*composed[:4], *mixtures[4:8]]
    nobody = [Adapters()] * _BATCH
    return [
        Kind(name=BASE, rows=nobody),
        Kind(name=LARGE, rows=[Adapters((one.use(),)) for one in large], beside=BASE),
        Kind(name=COMPOSED, rows=composed, beside=LARGE),
        Kind(name=SMALL, rows=plain, beside=BASE),
        Kind(name=MIXED, rows=mixtures, beside=SMALL),
        Kind(name=HALF_BASE, rows=nobody[:8]),
        Kind(name=HALF_MIXED, rows=half),
        Kind(name=BOTH, rows=[row for pair in zip(half, nobody[:8], strict=True) for row in pair]),
    ]


def _parts(small: Sequence[Held], row: int) -> Sequence[Held]:
    return small[_PARTS * row : _PARTS * (row + 1)]


def _save_mixtures(path: Path, base: BaseShape, experts: Sequence[tuple[str, str]]) -> list[Path]:
    """Write sixteen mixtures of four experts each, (id, directory), with random routers."""
    config = MixtureConfig(num_experts=_PARTS, top_k=2)
    paths = []
    for row in range(_BATCH):
        weight = torch.randn(base.num_layers, _PARTS, 768, generator=torch.Generator().manual_seed(row))
        named = experts[_PARTS * row : _PARTS * (row + 1)]
        mixture = Mixture(
            config,
            MixtureParams(weight),
            tuple(Expert(digest_of(Path(place)), AdapterId(adapter_id)) for adapter_id, place in named),
        )
        paths.append(path / f"mixture-{row:02d}")
        mixture_files.write(mixture, paths[-1], base)
    return paths


def _mixture(held: Held, experts: Sequence[Held]) -> Adapters:
    return Adapters(canonical(expert.use() for expert in experts), MixtureUse(held.digest))


def _step_ms(loop: EngineLoop, rows: Sequence[Adapters], num_new: int, salt: str) -> float:
    asked = [
        (0.0, loop.request(prompt, num_new, row.uses, row.mixture, salt=salt))
        for row, prompt in zip(rows, prompts(len(rows), _NUM_PROMPT), strict=True)
    ]
    times = np.array(loop.run(asked))  # [rows, num_new]: several tokens may come at a time
    return 1e3 * float(np.median((times[:, -1] - times[:, 0]) / (num_new - 1)))


def _measure(directory: Path, num_new: int, repeats: int, tick: Callable[[str], None]) -> list[Measured]:
    tick("making the adapters")
    path = models.base(_MODEL)
    small, large = (Hold(lora_of(rank), count).make(_MODEL) for rank, count in ((8, _PARTS * _BATCH), (32, _BATCH)))
    tick("loading")
    model = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="bfloat16")
    loop = EngineLoop(WeftConfig(model=model))
    held = [loop.hold(Path(place)) for _, place in small]
    mixtures = [
        _mixture(loop.hold(place), _parts(held, row))
        for row, place in enumerate(_save_mixtures(directory, loop.model.base.shape, small))
    ]
    kinds = _kinds(held, [loop.hold(Path(place)) for _, place in large], mixtures)
    turns: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for kind in kinds:
        _step_ms(loop, kind.rows, 4, "warm")
    for turn in range(repeats):
        for kind in kinds:
            tick(f"{kind.name}, turn {turn + 1} of {repeats}")
            turns[kind.name].append(_step_ms(loop, kind.rows, num_new, str(turn)))
    return [
        Measured(
            batch=kind.name,
            step_ms=statistics.median(turns[kind.name]),
            beside=kind.beside,
            ratio=_ratio(turns[kind.name], turns[kind.beside]) if kind.beside else None,
            turns_ms=turns[kind.name],
        )
        for kind in kinds
    ]


def _ratio(times: Sequence[float], beside: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, beside, strict=True))


def _extra(results: Sequence[Measured]) -> float:
    """Return what eight base rows cost more beside mixed ones than beside base ones, in shares of a step of sixteen."""
    both, mixed, base, half = (
        next(one.turns_ms for one in results if one.batch == name) for name in (BOTH, HALF_MIXED, BASE, HALF_BASE)
    )
    return statistics.median(((a - b) - (c - d)) / a for a, b, c, d in zip(both, mixed, base, half, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns per kind of row (default 5)")
    parser.add_argument("--new-tokens", type=int, default=48, help="output tokens per request (default 48)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as directory, Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"making {_MODEL}", total=None)

        def tick(text: str) -> None:
            progress.update(task, description=text)

        results = _measure(Path(directory), arguments.new_tokens, arguments.repeats, tick)
    cells = [["batch", "step, ms", "beside", "ratio"]]
    cells += [[r.batch, f"{r.step_ms:.1f}", r.beside, "" if r.ratio is None else f"{r.ratio:.2f} ×"] for r in results]
    extra = _extra(results)
    console.print(table("what mixing costs, bench-80m (81M Llama, bfloat16)", cells))
    console.print(f"8 base rows beside mixed ones: {100 * extra:+.1f} % of the step", highlight=False)
    under = report.conditions()
    console.print(f"{report.line(under)}, median of {arguments.repeats} turns", highlight=False)
    if arguments.json is not None:
        rows = [asdict(r) for r in results]
        record = {"command": "python -m benchmarks.mixing", **under, "rows": rows, "base_rows_extra": extra}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
