"""vLLM on a CPU: its engine in this process, stepped here, which favours it over its own server.

It runs in bfloat16, with threads bound to the cores, and chunked prefill and prefix caching by default. Without
adapters it compiles the model; with adapters, by its own rule, it does not, and steps without overlap. The OpenMP
library that it requires is loaded before everything else. In a separate process the engine is slower (438 tokens/s
against 730, base, `bench-80m`, batch 16, 2 cores of an AMD EPYC), because the two processes share the cores.

In a batch of requests for adapters and for the base, 0.32.0 answers the latter through a LoRA: its punica wrapper for
CPUs uses slot -1 as an index. So a time for such a trace would not be honest.
"""

import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import workload
from benchmarks.backends import lora_directory, worker
from benchmarks.backends.arrivals import Arrivals
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput
    from vllm.lora.request import LoRARequest

_PRELOADED = Path(sys.prefix) / "lib" / "libiomp5.so"
_KV_SPACE_GIB = "1"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that its buffers can be made for."""


class VllmCpu:
    """One engine for all runs."""

    def __init__(self) -> None:
        self._engine: LLMEngine | None = None
        self._adapters: dict[str, LoRARequest] = {}

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        if spec.quantization != "none":
            raise Cannot("bitsandbytes left its core in 0.28, and the plugin for it is none for a CPU")
        rank_max = lora_directory.rank_max(Path(path) for _, path in spec.adapters)
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": _KV_SPACE_GIB,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm import EngineArgs, LLMEngine

        lora = {}
        if spec.adapters:
            lora = {
                "enable_lora": True,
                "max_loras": min(spec.max_num_seqs, len(spec.adapters)),
                "max_cpu_loras": max(spec.max_num_seqs, len(spec.adapters)),
                "max_lora_rank": next(rank for rank in _RANKS if rank >= rank_max),
            }
        arguments = EngineArgs(
            model=spec.model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            **lora,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        for adapter_id, path in spec.adapters:
            self._engine.add_lora(self._named(adapter_id, path))
        return {package: version(package) for package in ("vllm-cpu", "torch")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        counts = {len(request.adapters) for request in trace.requests}
        if max(counts) > 1:
            raise Cannot("a request takes one LoRA")
        if counts == {0, 1}:
            raise Cannot("requests of the base beside requests of LoRAs are answered through the LoRA of its last slot")
        if trace.registrations and not self._adapters:
            raise Cannot("an engine that was started without LoRA takes none")
        started_s = time.monotonic()
        arrivals = Arrivals(trace, started_s)
        tokens: list[list[int]] = [[] for _ in trace.requests]
        token_s: list[list[float]] = [[] for _ in trace.requests]
        while arrivals.is_left() or self._running.has_unfinished_requests():
            for number, request in arrivals.requests():
                self._add(number, request, salt)
            for one in arrivals.registrations():
                self._running.add_lora(self._named(one.adapter_id, one.path))
            if not self._running.has_unfinished_requests():
                arrivals.wait()
                continue
            for output in self._running.step():
                _take(output, tokens, token_s)
        for one in trace.registrations:
            self._running.remove_lora(self._adapters.pop(one.adapter_id).lora_int_id)
        return Outcome(
            records=tuple(
                Record(arrival_s=started_s + request.arrival_s, token_s=tuple(times), token_ids=tuple(ids))
                for request, times, ids in zip(trace.requests, token_s, tokens, strict=True)
            ),
            notes={"duration_s": time.monotonic() - started_s},
        )

    def close(self) -> None:
        self._engine = None

    @property
    def _running(self) -> "LLMEngine":
        assert self._engine is not None, "load comes first"
        return self._engine

    def _named(self, adapter_id: str, path: str) -> "LoRARequest":
        from vllm.lora.request import LoRARequest

        number = 1 + max((known.lora_int_id for known in self._adapters.values()), default=0)
        self._adapters[adapter_id] = LoRARequest(adapter_id, number, path)
        return self._adapters[adapter_id]

    def _add(self, number: int, request: workload.Request, salt: str) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._running.add_request(
            str(number),
            {"prompt_token_ids": list(request.prompt), "cache_salt": salt},
            SamplingParams(
                temperature=0,
                max_tokens=request.num_new_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            ),
            lora_request=self._adapters[request.adapters[0]] if request.adapters else None,
        )


def _take(output: "RequestOutput", tokens: list[list[int]], token_s: list[list[float]]) -> None:
    now_s, number = time.monotonic(), int(output.request_id.split("-")[0])
    new = output.outputs[0].token_ids
    tokens[number] += new
    token_s[number] += [now_s] * len(new)


if __name__ == "__main__":
    if str(_PRELOADED) not in os.environ.get("LD_PRELOAD", "") and _PRELOADED.exists():
        command = [sys.executable, "-m", "benchmarks.backends.vllm_cpu"]
        os.execve(sys.executable, command, {**os.environ, "LD_PRELOAD": str(_PRELOADED)})
    worker.serve(VllmCpu())
