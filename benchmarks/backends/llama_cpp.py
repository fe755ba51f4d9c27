"""llama.cpp's own HTTP server, inside this process, with one stream per request.

There are as many slots as requests in the batch. Each request names its adapters with a scale, and the server never
computes requests of different adapters together. It finishes one adapter's requests before it starts the next one's, so
its gaps between tokens are short and its first tokens late. Adapters are read at start-up; a running server cannot add
one.

The wheel is compiled for AVX2; a native build would be faster on a machine with AVX-512.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import gguf
import xllamacpp

from benchmarks import workload
from benchmarks.backends import gguf_files, worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

_WEIGHTS = gguf.GGMLQuantizationType.BF16
"""The type of the model's own file. float16 is no faster: 207 tokens/s against 213, base, `bench-80m`, batch 16."""

_OFF = 0.0
"""Scale of an adapter that a request does not name; a request that names none uses all as they were loaded."""

_EVENT = b"data: "

Event = tuple[float, bytes]
"""Time of an event, and its JSON."""


class LlamaCpp:
    """The server, and the adapters by the names that requests use."""

    def __init__(self) -> None:
        self._server: xllamacpp.Server | None = None
        self._adapters: dict[str, int] = {}

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        if spec.quantization != "none":
            raise Cannot(f"GGUF has no bitsandbytes {spec.quantization}")
        model = Path(spec.model)
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf_files.base_file(model, _WEIGHTS))
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(gguf_files.lora_file(Path(path), model)), _OFF)
            for _, path in spec.adapters
        ]
        params.n_parallel = spec.max_num_seqs
        params.n_ctx = spec.max_num_seqs * spec.max_model_len
        params.kv_unified = False  # each slot attends only to its own keys: 207 tokens/s against 175
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        params.cache_ram_mib = 0  # no run may speed up the next
        self._adapters = {adapter_id: number for number, (adapter_id, _) in enumerate(spec.adapters)}
        self._server = xllamacpp.Server(params)
        return {package: version(package) for package in ("xllamacpp", "gguf")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        del salt  # no request uses the cache
        if trace.registrations:
            raise Cannot("it takes adapters only when it starts")
        return asyncio.run(self._run(trace))

    def close(self) -> None:
        self._server = None  # ends the server

    async def _run(self, trace: workload.Trace) -> Outcome:
        asked = [self._serialized(request) for request in trace.requests]
        started_s, cpu_s = time.monotonic(), time.thread_time()
        answers = await asyncio.gather(
            *(
                self._stream(message, started_s + request.arrival_s)
                for message, request in zip(asked, trace.requests, strict=True)
            )
        )
        notes = {"client_cpu_s": time.thread_time() - cpu_s, "duration_s": time.monotonic() - started_s}
        records = [
            _record(started_s + request.arrival_s, came) for request, came in zip(trace.requests, answers, strict=True)
        ]
        return Outcome(records=tuple(records), notes=notes)

    async def _stream(self, message: bytes, due_s: float) -> list[Event]:
        await asyncio.sleep(due_s - time.monotonic())
        assert self._server is not None, "load comes first"
        address = self._server.listening_address.removeprefix("http://")
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(message)
        came = []
        async for line in reader:  # an event is one chunk, so no line of JSON is cut
            if line.startswith(_EVENT):
                came.append((time.monotonic(), line))
        writer.close()
        return came

    def _serialized(self, request: workload.Request) -> bytes:
        weight = 1 / max(1, len(request.adapters))
        body = {
            "prompt": request.prompt,
            "n_predict": request.num_new_tokens,
            "temperature": 0,
            "lora": [{"id": self._adapters[name], "scale": weight} for name in request.adapters],
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        data = json.dumps(body).encode()
        head = ("POST /completion HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(data)}")
        return "\r\n".join((*head, "", "")).encode() + data


def _record(arrival_s: float, came: Sequence[Event]) -> Record:
    token_s, token_ids = [], []
    for arrived_s, line in came:
        event = json.loads(line.removeprefix(_EVENT))
        if "error" in event:
            raise RuntimeError(event["error"])
        tokens = event["tokens"]
        token_s += [arrived_s] * len(tokens)
        token_ids += tokens
    return Record(arrival_s=arrival_s, token_s=tuple(token_s), token_ids=tuple(token_ids))


if __name__ == "__main__":
    worker.serve(LlamaCpp())
