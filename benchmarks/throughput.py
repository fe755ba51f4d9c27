"""`make bench`: output tokens per second of Weft over gRPC beside PEFT's mixed batch, on the same weights.

Both hold the same base and the same sixteen LoRAs, run the same prompts to the same length with greedy decoding, and
take turns (A, B, A, B …), so that a ratio holds although the machine's speed drifts. Weft is what a user gets: the
server with default settings, real sockets, one request per stream; PEFT is `generate(adapter_names=[…])` on a full
batch.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
import peft
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import logging as transformers_logging

from benchmarks import report
from benchmarks.model import prompts, save_bench_80m, save_loras
from weft.api.serve import build_model, serving
from weft.config import EngineConfig, ModelConfig, Quantization, ServerConfig, WeftConfig
from weft.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2_grpc,
)
from weft_training.demo.document import insert, markdown, table

_BATCH = 16
_NUM_PROMPT = 64
_TITLE = f"bench-80m (81M Llama), batch {_BATCH}, {_NUM_PROMPT} tokens in, output tokens/s"
_BASES = {"none": "bfloat16", "nf4": "NF4"}
_MARKER = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of the result: medians over the repeats, in output tokens per second."""

    quantization: str
    adapters: str
    num_new_tokens: int
    weft: float
    peft: float
    ratio: float  # median of the ratios of each turn
    weft_runs: list[float]
    peft_runs: list[float]


async def _weft_run(channel: grpc.aio.Channel, adapters: list[str], num_new: int, salt: str) -> float:
    stub = generation_service_pb2_grpc.GenerationServiceStub(channel)

    async def one(index: int, prompt: list[int]) -> int:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.Sampling(temperature=0),
            stopping=generation_pb2.Stopping(max_new_tokens=num_new, ignore_eos=True),
            cache_salt=salt,  # a fresh one per run: no run finds another's prefix cache
        )
        if adapters:
            request.adapter_id = adapters[index]
        num_tokens = 0
        async for message in stub.StreamGenerate(request):
            if message.HasField("finish"):
                num_tokens = message.finish.usage.completion_tokens
        return num_tokens

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts(_BATCH, _NUM_PROMPT))))
    seconds = time.perf_counter() - started
    assert counts == [num_new] * _BATCH, counts
    return sum(counts) / seconds


def _peft_model(path: Path, quantization: Quantization, loras: list[Path]) -> peft.PeftModel:
    quantized = None
    if quantization is Quantization.NF4:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantized)
    wrapped = peft.PeftModel.from_pretrained(model, str(loras[0]), adapter_name=loras[0].name)
    for lora in loras[1:]:
        wrapped.load_adapter(str(lora), adapter_name=lora.name)
    return wrapped.eval()


@torch.inference_mode()
def _peft_run(model: peft.PeftModel, adapters: list[str], num_new: int) -> float:
    ids = torch.tensor(prompts(_BATCH, _NUM_PROMPT))
    names = adapters or ["__base__"] * _BATCH
    started = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - started
    assert out.shape == (_BATCH, _NUM_PROMPT + num_new), out.shape
    return _BATCH * num_new / seconds


async def _compare(
    quantization: Quantization, directory: Path, num_new: int, repeats: int, tick: Callable[[str], None]
) -> list[Measured]:
    config = WeftConfig(
        model=ModelConfig(path=directory / "bench-80m", quantization=quantization, device="cpu", dtype="bfloat16"),
        store=directory / f"store-{quantization.value}",
        engine=EngineConfig(),
        server=ServerConfig(port=0, metrics_port=0),
    )
    tick(f"{quantization.value}: loading")
    model, runner = build_model(config)
    loras = save_loras(config.store / "src", model.shape, count=_BATCH, rank=8)
    names = [path.name for path in loras]
    rival = _peft_model(config.model.path, quantization, loras)
    results = []
    async with (
        serving(config, model, runner, []) as served,
        grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel,
    ):
        register = adapter_service_pb2_grpc.AdapterServiceStub(channel).RegisterAdapter
        for name in names:
            await register(adapter_service_pb2.RegisterAdapterRequest(adapter_id=name, source=f"src/{name}"))
        for label, adapters in (("none (base)", []), ("16 LoRAs, rank 8", names)):
            await _weft_run(channel, adapters, 4, f"warm {label}")
            _peft_run(rival, adapters, 4)
            weft, peft_s = [], []
            for turn in range(repeats):
                tick(f"{quantization.value}, adapters: {label}, turn {turn + 1} of {repeats}")
                weft.append(await _weft_run(channel, adapters, num_new, f"{label} {turn}"))
                peft_s.append(_peft_run(rival, adapters, num_new))
            results.append(
                Measured(
                    quantization=quantization.value,
                    adapters=label,
                    num_new_tokens=num_new,
                    weft=statistics.median(weft),
                    peft=statistics.median(peft_s),
                    ratio=statistics.median(a / b for a, b in zip(weft, peft_s, strict=True)),
                    weft_runs=weft,
                    peft_runs=peft_s,
                )
            )
    return results


def _cells(results: list[Measured]) -> list[list[str]]:
    cells = [["base", "adapters", "out", "Weft, gRPC", "PEFT", "Weft ÷ PEFT", "Weft ÷ its own base"]]
    for row in results:
        own_base = next(r.weft for r in results if r.quantization == row.quantization)
        speeds = (f"{row.weft:.0f}", f"{row.peft:.0f}", f"{row.ratio:.2f}", f"{row.weft / own_base:.2f}")
        cells.append([_BASES[row.quantization], row.adapters, str(row.num_new_tokens), *speeds])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns per row (default 3)")
    parser.add_argument("--new-tokens", type=int, default=32, help="output tokens per request (default 32)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--markdown", type=Path, help=f"also write the table into this file, after <!-- {_MARKER} -->")
    arguments = parser.parse_args()
    document = None if arguments.markdown is None else insert("", arguments.markdown.read_text(), _MARKER)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = Console()
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory, Progress(console=console, transient=True) as progress:
        task = progress.add_task("making bench-80m", total=None)
        save_bench_80m(Path(directory) / "bench-80m")

        def tick(text: str) -> None:
            progress.update(task, description=text)

        async def compare(quantization: Quantization) -> list[Measured]:
            return await _compare(quantization, Path(directory), arguments.new_tokens, arguments.repeats, tick)

        for quantization in (Quantization.NONE, Quantization.NF4):
            results += asyncio.run(compare(quantization))
    cells, under = _cells(results), report.conditions("peft")
    turns = f"{report.line(under)}, median of {arguments.repeats} turns"
    console.print(table(_TITLE, cells, num_names=2))
    console.print(turns, highlight=False)
    if document is not None:
        text = f"{markdown(cells, num_names=2)}\n\n{turns}"
        arguments.markdown.write_text(insert(text, document, _MARKER))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": "make bench", **under, "rows": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
