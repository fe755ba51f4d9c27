"""mistral.rs inside this process, with a streaming chat request and a thread for each request.

On a CPU it has no paged attention, and its scheduler batches only requests of equal length. Weights are held in
float32, with the same values as in bfloat16, because it is faster: 197 tokens/s against 140, and 88 with float16
(`bench-80m`, batch 16, 2 cores of an AMD EPYC).
"""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import workload
from benchmarks.backends import lora_directory, mistral_directory, vocabulary, worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

if TYPE_CHECKING:
    from mistralrs import Runner

_MAX_ADAPTERS = 16
"""Its own default, for adapters that are added while it runs."""

_MAX_RANK = 256
"""Its own default, raised if an adapter has more."""


class MistralRs:
    """A runner for all runs."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._sending = threading.Lock()  # its runner accepts one call at a time

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        if spec.quantization != "none":
            raise Cannot(f"it would quantize by formats of its own, not by bitsandbytes {spec.quantization}")
        rank_max = lora_directory.rank_max(Path(path) for _, path in spec.adapters)
        os.environ["RAYON_NUM_THREADS"] = str(spec.threads)
        from mistralrs import Architecture, LoraAdapter, ModelDType, Runner, Which

        base = {
            "model_id": str(mistral_directory.beside(Path(spec.model))),
            "arch": Architecture.Llama,
            "dtype": ModelDType.F32,
        }
        which = Which.Plain(**base)
        if spec.adapters:
            which = Which.Lora(
                adapters=[LoraAdapter(alias=adapter_id, source=path) for adapter_id, path in spec.adapters],
                max_adapters=_MAX_ADAPTERS + len(spec.adapters),
                max_rank=max(_MAX_RANK, rank_max),
                **base,
            )
        self._runner = Runner(which, max_seqs=spec.max_num_seqs, prefix_cache_n=0)
        return {"mistralrs": version("mistralrs")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        del salt  # it caches no prefix
        if any(len(request.adapters) > 1 for request in trace.requests):
            raise Cannot("a request takes one LoRA")
        started_s = time.monotonic()
        with ThreadPoolExecutor(max_workers=len(trace.requests) + len(trace.registrations)) as threads:
            churn = [threads.submit(self._bring, one, started_s) for one in trace.registrations]
            records = tuple(threads.map(lambda request: self._stream(request, started_s), trace.requests))
        for brought, one in zip(churn, trace.registrations, strict=True):
            brought.result()
            self._running.unload_lora_adapter(one.adapter_id)
        return Outcome(records=records, notes={"duration_s": time.monotonic() - started_s})

    def close(self) -> None:
        self._runner = None

    @property
    def _running(self) -> "Runner":
        assert self._runner is not None, "load comes first"
        return self._runner

    def _bring(self, one: workload.Registration, started_s: float) -> None:
        time.sleep(max(0.0, started_s + one.arrival_s - time.monotonic()))
        with self._sending:
            self._running.load_lora_adapter(one.adapter_id, one.path)

    def _stream(self, request: workload.Request, started_s: float) -> Record:
        from mistralrs import ChatCompletionRequest

        asked = ChatCompletionRequest(
            messages=vocabulary.text(request.prompt),
            model="default",
            max_tokens=request.num_new_tokens,
            temperature=0.0,
            stream=True,
            ignore_eos=True,
            adapter=request.adapters[0] if request.adapters else None,
        )
        due_s = started_s + request.arrival_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        with self._sending:
            chunks = self._running.send_chat_completion_request(asked)
        token_s, token_ids = [], []
        for chunk in chunks:
            tokens = vocabulary.token_ids(chunk.choices[0].delta.content or "")
            token_s += [time.monotonic()] * len(tokens)
            token_ids += tokens
        return Record(arrival_s=due_s, token_s=tuple(token_s), token_ids=tuple(token_ids))


if __name__ == "__main__":
    worker.serve(MistralRs())
