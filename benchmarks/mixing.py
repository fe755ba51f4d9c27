"""What mixing costs: the step time of compositions and mixtures beside plain LoRAs, `python -m benchmarks.mixing`.

Requests decode in lockstep over gRPC on `bench-80m` with default settings; the step time is the median time between two
tokens of a stream. The kinds of batches take turns (A, B, C, A, B, C …), so that a ratio holds although the machine's
speed drifts. What eight rows without adapters cost beside eight with them is the difference to those eight alone; what
they cost by themselves is the difference between sixteen and eight rows of the base.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import report
from benchmarks.model import prompts, save_bench_80m, save_loras
from weft.adapters.identifiers import AdapterId, Generation
from weft.api.serve import build_model, serving
from weft.config import EngineConfig, ModelConfig, Quantization, ServerConfig, WeftConfig
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape
from weft.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2_grpc,
)
from weft_training.demo.document import table

_BATCH = 16
_NUM_PROMPT = 64
_PARTS = 4

Adapters = Sequence[str]
"""What a row names: none is the base, one an adapter, several a composition at weights 1/n."""


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


def _kinds(small: Adapters, large: Adapters, mixtures: Adapters) -> list[Kind]:
    """small: 4 × 16 LoRAs of rank 8; large: 16 of rank 32; mixtures: 16, each of 4 of the small ones."""
    plain, alone = [(name,) for name in small[:_BATCH]], [(name,) for name in mixtures]
    composed = [tuple(small[_PARTS * row : _PARTS * (row + 1)]) for row in range(_BATCH)]
    half = [*composed[:4], *alone[4:8]]
    nobody: list[Adapters] = [()] * _BATCH
    return [
        Kind(name=BASE, rows=nobody),
        Kind(name=LARGE, rows=[(name,) for name in large], beside=BASE),
        Kind(name=COMPOSED, rows=composed, beside=LARGE),
        Kind(name=SMALL, rows=plain, beside=BASE),
        Kind(name=MIXED, rows=alone, beside=SMALL),
        Kind(name=HALF_BASE, rows=nobody[:8]),
        Kind(name=HALF_MIXED, rows=half),
        Kind(name=BOTH, rows=[row for pair in zip(half, nobody[:8], strict=True) for row in pair]),
    ]


def _save_mixtures(path: Path, base: BaseShape, experts: Sequence[adapter_pb2.Adapter]) -> list[Path]:
    """Sixteen mixtures of four experts each, with random routers."""
    config = MixtureConfig(num_experts=_PARTS, top_k=2)
    paths = []
    for row in range(_BATCH):
        weight = torch.randn(base.num_layers, _PARTS, 768, generator=torch.Generator().manual_seed(row))
        named = experts[_PARTS * row : _PARTS * (row + 1)]
        mixture = Mixture(
            config,
            MixtureParams(weight),
            tuple(Expert(Generation(one.generation), AdapterId(one.adapter_id)) for one in named),
        )
        paths.append(path / f"mixture-{row:02d}")
        mixture_files.write(mixture, paths[-1], base)
    return paths


async def _step_ms(channel: grpc.aio.Channel, rows: Sequence[Adapters], num_new: int, salt: str) -> float:
    stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
    gaps: list[float] = []
    start = asyncio.Barrier(len(rows))

    async def one(adapters: Adapters, prompt: list[int]) -> None:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.Sampling(temperature=0),
            stopping=generation_pb2.Stopping(max_new_tokens=num_new, ignore_eos=True),
            cache_salt=salt,
        )
        if len(adapters) == 1:
            request.adapter_id = adapters[0]
        elif adapters:
            parts = [generation_pb2.WeightedAdapter(adapter_id=name, weight=1 / len(adapters)) for name in adapters]
            request.composition.adapters.extend(parts)
        await start.wait()
        last = None
        async for message in stub.StreamGenerate(request):
            if message.HasField("finish"):
                assert message.finish.usage.completion_tokens == num_new, message
            else:
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now

    asked = zip(rows, prompts(len(rows), _NUM_PROMPT), strict=True)
    await asyncio.gather(*(one(adapters, prompt) for adapters, prompt in asked))
    return 1e3 * statistics.median(gaps)


async def _measure(directory: Path, num_new: int, repeats: int, tick: Callable[[str], None]) -> list[Measured]:
    config = WeftConfig(
        model=ModelConfig(path=directory / "bench-80m", quantization=Quantization.NONE, device="cpu", dtype="bfloat16"),
        store=directory / "store",
        engine=EngineConfig(),
        server=ServerConfig(port=0, metrics_port=0),
    )
    tick("loading")
    model, runner = build_model(config)
    source = config.store / "src"
    async with (
        serving(config, model, runner, []) as served,
        grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel,
    ):
        register = adapter_service_pb2_grpc.AdapterServiceStub(channel).RegisterAdapter

        async def registered(paths: Sequence[Path]) -> list[adapter_pb2.Adapter]:
            answers = []
            for path in paths:
                relative = path.relative_to(config.store)
                name = "-".join(relative.parts[1:])
                wanted = adapter_service_pb2.RegisterAdapterRequest(adapter_id=name, source=str(relative))
                answers.append((await register(wanted)).adapter)
            return answers

        small = await registered(save_loras(source / "r8", model.shape, count=_PARTS * _BATCH, rank=8))
        large = await registered(save_loras(source / "r32", model.shape, count=_BATCH, rank=32))
        mixtures = await registered(_save_mixtures(source / "of", model.shape, small))
        kinds = _kinds(*([one.adapter_id for one in listed] for listed in (small, large, mixtures)))
        turns: dict[str, list[float]] = {kind.name: [] for kind in kinds}
        for kind in kinds:
            await _step_ms(channel, kind.rows, 4, "warm")
        for turn in range(repeats):
            for kind in kinds:
                tick(f"{kind.name}, turn {turn + 1} of {repeats}")
                turns[kind.name].append(await _step_ms(channel, kind.rows, num_new, str(turn)))
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
    """What eight base rows cost beside mixed ones, more than beside base ones: in shares of a step of sixteen."""
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
        task = progress.add_task("making bench-80m", total=None)
        save_bench_80m(Path(directory) / "bench-80m")

        def tick(text: str) -> None:
            progress.update(task, description=text)

        results = asyncio.run(_measure(Path(directory), arguments.new_tokens, arguments.repeats, tick))
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
