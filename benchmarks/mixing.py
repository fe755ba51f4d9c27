"""What mixing costs: the step time of compositions and mixtures beside plain LoRAs, `python -m benchmarks.mixing`.

Sixteen requests decode in lockstep over gRPC on `bench-80m` with default settings. The step time is the median time
between two tokens of a stream. The kinds of rows take turns (A, B, C, A, B, C …), so that a ratio holds although the
machine's speed drifts.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
from rich.console import Console
from rich.progress import Progress

from benchmarks import report
from benchmarks.model import VOCAB_SIZE, save_bench_80m, save_loras
from weft.api.serve import build_model, serving
from weft.config import EngineConfig, ModelConfig, Quantization, ServerConfig, WeftConfig
from weft.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2_grpc,
)

_BATCH = 16
_NUM_PROMPT = 64
_PARTS = 4

Adapters = Sequence[str]
"""What a row names: none is the base, one an adapter, several a composition at weights 1/n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One kind of batch. Milliseconds; `ratio` is the median over the turns of its time ÷ that of `beside`."""

    rows: str
    step_ms: float
    beside: str
    ratio: float | None
    turns_ms: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    name: str
    rows: Sequence[Adapters]
    beside: str = ""


def _kinds(small: Adapters, large: Adapters, mixtures: Adapters) -> list[_Kind]:
    """small: 4 × 16 LoRAs of rank 8; large: 16 of rank 32; mixtures: 16 of 4 of the small ones."""
    plain = [(name,) for name in small[:_BATCH]]
    composed = [tuple(small[_PARTS * row : _PARTS * (row + 1)]) for row in range(_BATCH)]
    mixed = [(name,) for name in mixtures]
    half = _BATCH // 2
    nobody: list[Adapters] = [()] * half
    return [
        _Kind(name="base", rows=[()] * _BATCH),
        _Kind(name="LoRA, rank 32", rows=[(name,) for name in large], beside="base"),
        _Kind(name="composition of 4 LoRAs, rank 8", rows=composed, beside="LoRA, rank 32"),
        _Kind(name="LoRA, rank 8", rows=plain, beside="base"),
        _Kind(name="mixture of 4 LoRAs, rank 8, top 2", rows=mixed, beside="LoRA, rank 8"),
    ]


async def _step_ms(channel: grpc.aio.Channel, rows: Sequence[Adapters], num_new: int, salt: str) -> float:
    stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
    dice = random.Random(0)
    gaps: list[float] = []
    started = asyncio.Barrier(len(rows))

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
        await started.wait()
        last = None
        async for message in stub.StreamGenerate(request):
            if message.HasField("finish"):
                assert message.finish.usage.completion_tokens == num_new, message
            else:
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now

    prompts = [[dice.randrange(1, VOCAB_SIZE) for _ in range(_NUM_PROMPT)] for _ in rows]
    await asyncio.gather(*(one(adapters, prompt) for adapters, prompt in zip(rows, prompts, strict=True)))
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

        async def registered(paths: Sequence[Path]) -> list[str]:
            for path in paths:
                await register(
                    adapter_service_pb2.RegisterAdapterRequest(
                        adapter_id=path.parent.name + path.name, source=str(path.relative_to(config.store))
                    )
                )
            return [path.parent.name + path.name for path in paths]

        small = await registered(save_loras(source / "r8", model.shape, count=_PARTS * _BATCH, rank=8))
        large = await registered(save_loras(source / "r32", model.shape, count=_BATCH, rank=32))
        kinds = _kinds(small, large, [])
        turns: dict[str, list[float]] = {kind.name: [] for kind in kinds}
        for turn in range(-1, repeats):
            for kind in kinds:
                if not kind.rows:
                    continue
                tick(f"{kind.name}, turn {turn + 1} of {repeats}")
                took = await _step_ms(channel, kind.rows, num_new if turn >= 0 else 4, f"{turn}")
                if turn >= 0:
                    turns[kind.name].append(took)
    return [
        Measured(
            rows=kind.name,
            step_ms=statistics.median(turns[kind.name]),
            beside=kind.beside,
            ratio=None
            if not kind.beside
            else statistics.median(a / b for a, b in zip(turns[kind.name], turns[kind.beside], strict=True)),
            turns_ms=turns[kind.name],
        )
        for kind in kinds
        if turns[kind.name]
    ]


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
    cells = [["16 rows of", "step, ms", "beside", "ratio"]]
    cells += [[r.rows, f"{r.step_ms:.1f}", r.beside, "" if r.ratio is None else f"{r.ratio:.2f} ×"] for r in results]
    console.print(report.table("what mixing costs, bench-80m (81M Llama, bfloat16), batch 16", cells, num_names=1))
    console.print(f"{report.line(report.conditions())}, median of {arguments.repeats} turns", highlight=False)
    if arguments.json is not None:
        record = {"command": "python -m benchmarks.mixing", **report.conditions(), "rows": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
