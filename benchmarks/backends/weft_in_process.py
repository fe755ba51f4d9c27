"""Weft's engine without a server. The difference from `weft_grpc` is the cost of gRPC and streaming."""

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks import workload
from benchmarks.backends import worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record
from benchmarks.engine_loop import EngineLoop
from weft import __version__
from weft.config import ModelConfig, Quantization, ResidencyConfig, WeftConfig


class WeftInProcess:
    """An engine, whose thread is the worker's."""

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        model = ModelConfig(
            path=Path(spec.model), quantization=Quantization(spec.quantization), num_threads=spec.threads
        )
        config = WeftConfig(model=model)
        if spec.adapter_device_bytes is not None:
            config = replace(config, residency=ResidencyConfig(device_bytes=spec.adapter_device_bytes))
        self._loop = EngineLoop(config)
        self._held = {adapter_id: self._loop.hold(Path(path)) for adapter_id, path in spec.adapters}
        return {"weft": __version__, **{package: version(package) for package in ("torch", "transformers")}}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        if trace.registrations:
            raise Cannot("registering is the server's work")
        started_s = time.monotonic()
        requests = []
        for asked in trace.requests:
            uses = tuple(self._held[name].use(1 / len(asked.adapters)) for name in asked.adapters)
            requests.append(self._loop.request(asked.prompt, asked.num_new_tokens, uses, salt=salt))
        due_s = [started_s + asked.arrival_s for asked in trace.requests]
        times = self._loop.run(list(zip(due_s, requests, strict=True)))
        records = [
            Record(arrival_s=due, token_s=tuple(came), token_ids=tuple(request.output))
            for due, came, request in zip(due_s, times, requests, strict=True)
        ]
        return Outcome(records=tuple(records))

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker.serve(WeftInProcess())
