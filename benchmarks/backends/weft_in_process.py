"""Weft's engine without a server: requests go in and events come out on one thread. What gRPC costs is the rest."""

import hashlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path

from benchmarks import workload
from benchmarks.backends import worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record
from weft.adapters.identifiers import Generation
from weft.adapters.ingest import Ingested
from weft.adapters.slab import Slab
from weft.api.serve import build_model
from weft.config import ModelConfig, Quantization, ResidencyConfig, WeftConfig
from weft.engine.block_manager import cache_root
from weft.engine.engine import Engine, EngineCallbacks
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams, TokenEvent
from weft.methods.checkpoint.directory import CONFIG_FILE, WEIGHTS_FILE
from weft.metrics import Metrics
from weft.model import threads


class WeftInProcess:
    """One engine, whose thread is the caller's."""

    def __init__(self) -> None:
        self._slabs: dict[str, tuple[Generation, Slab]] = {}
        self._by_generation: dict[Generation, Slab] = {}
        self._events: list[tuple[float, list[TokenEvent]]] = []
        self._ids = count()

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        model = ModelConfig(
            path=Path(spec.model), quantization=Quantization(spec.quantization), num_threads=spec.threads
        )
        config = WeftConfig(model=model)
        if spec.adapter_device_bytes is not None:
            config = replace(config, residency=ResidencyConfig(device_bytes=spec.adapter_device_bytes))
        self._model, runner = build_model(config)
        threads.compute_with(spec.threads)
        self._engine = Engine(
            runner,
            config.engine,
            num_kv_blocks=self._model.num_kv_blocks,
            max_model_len=self._model.facts.max_model_len,
            callbacks=EngineCallbacks(events=self._came, load=self._fetch),
            metrics=Metrics(),
        )
        for adapter_id, path in spec.adapters:
            generation = Generation(hashlib.sha256(path.encode()).hexdigest())
            self._by_generation[generation] = self._read(Path(path)).slab
            self._slabs[adapter_id] = generation, self._by_generation[generation]
        return {package: version(package) for package in ("weft", "torch", "transformers")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        if trace.registrations:
            raise Cannot("registering is the server's work")
        started_s = time.monotonic()
        requests = {request.request_id: request for request in (self._request(one, salt) for one in trace.requests)}
        due = [started_s + one.arrival_s for one in trace.requests]
        waiting = deque(zip(due, requests.values(), strict=True))
        token_s: dict[RequestId, list[float]] = {request_id: [] for request_id in requests}
        left = set(requests)
        while left:
            while waiting and waiting[0][0] <= time.monotonic():
                self._engine.submit(waiting.popleft()[1])
            self._engine.turn()
            if not self._events and waiting:
                time.sleep(max(0.0, min(0.001, waiting[0][0] - time.monotonic())))
            for came_s, events in self._events:
                for event in events:
                    token_s[event.request_id] += [came_s] * len(event.tokens)
                    if event.finish is not None:
                        left.discard(event.request_id)
                        if event.finish.error is not None:
                            raise event.finish.error
            self._events.clear()
        records = [
            Record(
                arrival_s=started_s + asked.arrival_s,
                token_s=tuple(token_s[request_id]),
                token_ids=tuple(request.output),
            )
            for asked, (request_id, request) in zip(trace.requests, requests.items(), strict=True)
        ]
        return Outcome(records=tuple(records))

    def close(self) -> None:
        pass

    def _request(self, asked: workload.Request, salt: str) -> Request:
        uses = tuple(
            AdapterUse(generation, 1 / len(asked.adapters), slab.num_virtual_tokens)
            for generation, slab in map(self._slabs.__getitem__, asked.adapters)
        )
        return Request(
            request_id=RequestId(str(next(self._ids))),
            prompt_token_ids=asked.prompt,
            params=SamplingParams(temperature=0, max_new_tokens=asked.num_new_tokens),
            adapters=uses,
            cache_root=cache_root(salt, self._model.facts.digest, uses),
            arrival_s=time.monotonic(),
        )

    def _came(self, events: list[TokenEvent]) -> None:
        self._events.append((time.monotonic(), events))

    def _fetch(self, generation: Generation) -> None:
        self._engine.loaded(generation, self._by_generation[generation])

    def _read(self, path: Path) -> Ingested:
        config, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
        with config.open("rb") as config_file, weights.open("rb") as weights_file:
            size_bytes = config.stat().st_size + weights.stat().st_size
            return self._model.ingest.read(config_file, weights_file, size_bytes=size_bytes)


if __name__ == "__main__":
    worker.serve(WeftInProcess())
