"""Weft as a user runs it: `weft serve` in its own process, with default settings and one gRPC stream per request.

The client does as little as possible during the run, because it shares the cores with the server: requests are
serialized before it, and responses are parsed after it (http2.py).
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import grpc.aio

from benchmarks import workload
from benchmarks.backends import worker
from benchmarks.backends.http2 import Connection
from benchmarks.backends.worker import LoadSpec, Outcome, Record
from weft import __version__
from weft.v1 import adapter_service_pb2, adapter_service_pb2_grpc, generation_pb2

_STREAM = "/weft.v1.GenerationService/StreamGenerate"
_RPC_TIMEOUT_S = 600.0
_START_TIMEOUT_S = 120.0

Message = tuple[float, bytes]
"""Time of a message, and its bytes."""


class WeftGrpc:
    """The server's process and a channel to it. options: more of `weft serve`'s."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = options
        self._loop = asyncio.Runner()
        self._store = Path(tempfile.mkdtemp(prefix="weft-bench-"))
        self._server: subprocess.Popen[bytes] | None = None

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        sources = {str(Path(path).parent) for _, path in spec.adapters}
        port = _free_port()
        command = [sys.executable, "-m", "weft", "serve", spec.model, "--quantization", spec.quantization]
        command += ["--store", str(self._store), "--port", str(port), "--metrics-port", "0"]
        command += self._options
        command += [f"--allowed-source={source}" for source in sorted(sources)]
        if spec.adapter_device_bytes is not None:
            command += ["--adapter-device-bytes", str(spec.adapter_device_bytes)]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        self._loop.run(self._connect(port))
        self._loop.run(self._register(spec))
        return {"weft": __version__, **{package: version(package) for package in ("torch", "transformers", "grpcio")}}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        return self._loop.run(self._run(trace, salt))

    def close(self) -> None:
        self._loop.close()
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
        shutil.rmtree(self._store, ignore_errors=True)

    async def _connect(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._adapters = adapter_service_pb2_grpc.AdapterServiceStub(self._channel)
        assert self._server is not None
        until = time.monotonic() + _START_TIMEOUT_S
        ready = asyncio.ensure_future(self._channel.channel_ready())
        while not ready.done():
            if self._server.poll() is not None:
                raise RuntimeError(f"weft serve ended with exit code {self._server.returncode}")
            if time.monotonic() > until:
                raise TimeoutError(f"weft serve did not listen within {_START_TIMEOUT_S:g} s")
            await asyncio.wait([ready], timeout=0.1)
        self._authority = f"127.0.0.1:{port}"
        _, self._streams = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)

    async def _register(self, spec: LoadSpec) -> None:
        for adapter_id, path in spec.adapters:
            await self._adapters.RegisterAdapter(
                adapter_service_pb2.RegisterAdapterRequest(adapter_id=adapter_id, source=path),
                timeout=_RPC_TIMEOUT_S,
                wait_for_ready=True,
            )

    async def _run(self, trace: workload.Trace, salt: str) -> Outcome:
        asked = [_serialized(request, salt) for request in trace.requests]
        started_s, cpu_s = time.monotonic(), time.process_time()
        answers = asyncio.gather(
            *(
                self._stream(message, started_s + request.arrival_s)
                for message, request in zip(asked, trace.requests, strict=True)
            )
        )
        churn = [asyncio.create_task(self._bring(one, started_s)) for one in trace.registrations]
        messages = await asyncio.wait_for(answers, _RPC_TIMEOUT_S)
        self._streams.forget()
        notes = {"client_cpu_s": time.process_time() - cpu_s, "duration_s": time.monotonic() - started_s}
        for task, one in zip(churn, trace.registrations, strict=True):
            await task
            await self._adapters.UnregisterAdapter(
                adapter_service_pb2.UnregisterAdapterRequest(adapter_id=one.adapter_id), timeout=_RPC_TIMEOUT_S
            )
        records = [_record(request, started_s, came) for request, came in zip(trace.requests, messages, strict=True)]
        return Outcome(records=tuple(records), notes=notes)

    async def _stream(self, message: bytes, due_s: float) -> list[Message]:
        await asyncio.sleep(due_s - time.monotonic())
        return await self._streams.stream(_STREAM, message, self._authority)

    async def _bring(self, one: workload.Registration, started_s: float) -> None:
        """Register an adapter and bring it to the device, so that a cold load happens at its due time."""
        await asyncio.sleep(started_s + one.arrival_s - time.monotonic())
        await self._adapters.RegisterAdapter(
            adapter_service_pb2.RegisterAdapterRequest(adapter_id=one.adapter_id, source=one.path, pin=True),
            timeout=_RPC_TIMEOUT_S,
        )


def _serialized(request: workload.Request, salt: str) -> bytes:
    message = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=request.prompt),
        sampling=generation_pb2.Sampling(temperature=0),
        stopping=generation_pb2.Stopping(max_new_tokens=request.num_new_tokens, ignore_eos=True),
        options=generation_pb2.ResponseOptions(token_ids=True),
        cache_salt=salt,
    )
    if len(request.adapters) == 1:
        message.adapter_id = request.adapters[0]
    elif request.adapters:
        weight = 1 / len(request.adapters)
        parts = [generation_pb2.WeightedAdapter(adapter_id=name, weight=weight) for name in request.adapters]
        message.composition.adapters.extend(parts)
    return message.SerializeToString()


def _record(request: workload.Request, started_s: float, came: list[Message]) -> Record:
    token_s, token_ids = [], []
    for arrived_s, data in came:
        message = generation_pb2.StreamGenerateResponse.FromString(data)
        token_ids += message.delta.token_ids
        token_s += [arrived_s] * len(message.delta.token_ids)
    return Record(arrival_s=started_s + request.arrival_s, token_s=tuple(token_s), token_ids=tuple(token_ids))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    worker.serve(WeftGrpc())
