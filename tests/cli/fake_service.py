"""The contract in memory, behind real gRPC on a free port, for tests of the client and the commands.

An answer is the prompt in capitals, one delta for each word. The prompt "forever" is answered until the caller leaves.
"""
# ruff: noqa: N802 - the methods have the names that gRPC gives them

import hashlib
import itertools
import json
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from weft.api.status import status_of, trailing_metadata
from weft.config import MIB
from weft.errors import AdapterExists, AdapterNotFound, InvalidRequest, WeftError
from weft.v1 import adapter_pb2, adapter_service_pb2, generation_pb2, generation_service_pb2, model_pb2
from weft.v1.adapter_service_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from weft.v1.generation_service_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

PAGE_SIZE = 2
SEED = 2**60 + 1
GATES = (
    generation_pb2.AdapterGate(adapter_id="a\x1b[2Jb", digest="ab" * 32, mean=0.75, layer_means=[0.0, 0.5, 1.0]),
    generation_pb2.AdapterGate(digest="cd" * 32, mean=0.25, layer_means=[1e-3, 0.5, 0.0]),
)


class FakeService(GenerationServiceServicer, AdapterServiceServicer):
    """Records every request; `failures` are raised before anything is answered, one for each request of `failing`."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.failures: deque[WeftError] = deque()
        self.failing: type[Message] = Message
        self.adapters: dict[str, adapter_pb2.Adapter] = {}
        self.uploaded: dict[str, bytes] = {}
        self.left = threading.Event()
        self.has_chat_template = True

    def put(self, adapter_id: str, method: str = "lora", **fields: Any) -> adapter_pb2.Adapter:
        """Register an adapter without a call."""
        content = hashlib.sha256(json.dumps([adapter_id, method, str(fields)]).encode()).hexdigest()
        fields = {
            "digest": content,
            "state": adapter_pb2.ADAPTER_STATE_ACTIVE,
            "residency": adapter_pb2.ADAPTER_RESIDENCY_DISK,
            "size_bytes": 1536,
        } | fields
        self.adapters[adapter_id] = adapter_pb2.Adapter(adapter_id=adapter_id, method=method, **fields)
        return self.adapters[adapter_id]

    def last(self, kind: type[Message]) -> Any:
        """The newest request of a kind."""
        return next(request for request in reversed(self.requests) if isinstance(request, kind))

    # ---- GenerationService

    def Generate(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        text = _prompt(request).upper()
        return generation_pb2.GenerateResponse(
            request_id=request.request_id or "r1",
            text=text,
            logprobs=_logprobs(text, request),
            finish=self._finish(request),
        )

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[Any]:
        self._begin(request, context)
        context.add_callback(self.left.set)
        prompt = _prompt(request)
        words = itertools.repeat("ON ") if prompt == "forever" else prompt.upper().split(" ")
        for index, word in enumerate(words):
            text = word if index == 0 else f" {word}"
            delta = generation_pb2.Delta(text=text, logprobs=_logprobs(text, request))
            yield generation_pb2.StreamGenerateResponse(request_id="" if index else "r1", delta=delta)
            if prompt == "forever" and not context.is_active():
                return
        yield generation_pb2.StreamGenerateResponse(finish=self._finish(request))

    def Tokenize(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        token_ids = list(_prompt(request).encode())
        return generation_service_pb2.TokenizeResponse(
            token_ids=token_ids, pieces=map(chr, token_ids) if request.pieces else (), num_tokens=len(token_ids)
        )

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        model = model_pb2.ModelInfo(
            model_name="tiny",
            base_digest="ab" * 32,
            quantization="nf4",
            dtype="bfloat16",
            device="cpu",
            max_model_len=512,
            vocab_size=128,
            has_chat_template=self.has_chat_template,
            version="0.0.1",
            methods=["ia3", "lora"],
            sites=[model_pb2.Site(suffix="self_attn.q_proj", in_features=192, out_features=192, num_modules=4)],
        )
        model.request_limits.deadline_max.FromSeconds(600)
        return generation_service_pb2.GetModelInfoResponse(model=model)

    # ---- AdapterService

    def RegisterAdapter(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        adapter, outcome = self._registered(request, request.source.encode(), "lora", context)
        return adapter_service_pb2.RegisterAdapterResponse(adapter=adapter, outcome=outcome)

    def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        messages = iter(request_iterator)
        header = next(messages).header
        self._begin(header, context)
        files = [bytearray() for _ in header.files]
        for message in messages:
            chunk = message.chunk
            if not 1 <= len(chunk.data) <= MIB or chunk.offset != len(files[chunk.file_index]):
                _abort(context, InvalidRequest.rule("UPLOAD_PROTOCOL", "chunk", "out of order", given=chunk.offset))
            files[chunk.file_index] += chunk.data
        for declared, data in zip(header.files, files, strict=True):
            if (declared.size_bytes, declared.sha256) != (len(data), hashlib.sha256(data).hexdigest()):
                _abort(context, InvalidRequest.rule("CHECKSUM_MISMATCH", declared.name, "sha256", given=len(data)))
        self.uploaded = {declared.name: bytes(data) for declared, data in zip(header.files, files, strict=True)}
        method = json.loads(self.uploaded["adapter_config.json"])["peft_type"].lower()
        adapter, outcome = self._registered(header, b"".join(files), method, context)
        return adapter_service_pb2.UploadAdapterResponse(adapter=adapter, outcome=outcome)

    def UnregisterAdapter(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        if not request.allow_missing:
            self._find(request.adapter_id, context)
        self.adapters.pop(request.adapter_id, None)
        return adapter_service_pb2.UnregisterAdapterResponse(freed_device_bytes=3 * MIB, freed_kv_blocks=7)

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        return adapter_service_pb2.GetAdapterResponse(adapter=self._find(request.adapter_id, context))

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        found = [adapter for _, adapter in sorted(self.adapters.items()) if request.method in ("", adapter.method)]
        start = int(request.page_token or 0)
        token = str(start + PAGE_SIZE) if start + PAGE_SIZE < len(found) else ""
        page = found[start : start + PAGE_SIZE]
        return adapter_service_pb2.ListAdaptersResponse(adapters=page, next_page_token=token)

    def LoadAdapter(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        adapter = self._find(request.adapter_id, context)
        adapter.residency = request.residency
        adapter.pinned = request.pin
        return adapter_service_pb2.LoadAdapterResponse(adapter=adapter)

    def UnloadAdapter(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        adapter = self._find(request.adapter_id, context)
        adapter.residency = request.residency
        return adapter_service_pb2.UnloadAdapterResponse(adapter=adapter)

    def LiftQuarantine(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        adapter = self._find(request.adapter_id, context)
        adapter.state, adapter.state_reason = adapter_pb2.ADAPTER_STATE_ACTIVE, ""
        return adapter_service_pb2.LiftQuarantineResponse(adapter=adapter)

    def WatchAdapters(self, request: Any, context: Any) -> Iterator[Any]:
        self._begin(request, context)
        for adapter in self.adapters.values():
            change = adapter_service_pb2.ADAPTER_CHANGE_EXISTING
            yield adapter_service_pb2.WatchAdaptersResponse(change=change, adapter=adapter)
        yield adapter_service_pb2.WatchAdaptersResponse(change=adapter_service_pb2.ADAPTER_CHANGE_SYNCED)

    # ---- What they share

    def _begin(self, request: Message, context: Any) -> None:
        self.requests.append(request)
        if self.failures and isinstance(request, self.failing):
            _abort(context, self.failures.popleft())

    def _find(self, adapter_id: str, context: Any) -> adapter_pb2.Adapter:
        if adapter_id not in self.adapters:
            text = f"adapter_id: no adapter {adapter_id}"
            _abort(context, AdapterNotFound("ADAPTER_NOT_FOUND", text, metadata={"adapter_id": adapter_id}))
        return self.adapters[adapter_id]

    def _registered(self, request: Any, content: bytes, method: str, context: Any) -> tuple[adapter_pb2.Adapter, Any]:
        digest = hashlib.sha256(content).hexdigest()
        held = self.adapters.get(request.adapter_id)
        if held and held.digest == digest:
            return held, adapter_service_pb2.REGISTER_OUTCOME_UNCHANGED
        if held and not request.replace:
            _abort(context, AdapterExists("ADAPTER_EXISTS", f"adapter_id: {request.adapter_id} is taken"))
        adapter = self.put(request.adapter_id, method, digest=digest, size_bytes=len(content), rank=8)
        created, replaced = (
            adapter_service_pb2.REGISTER_OUTCOME_CREATED,
            adapter_service_pb2.REGISTER_OUTCOME_REPLACED,
        )
        return adapter, replaced if held else created

    def _finish(self, request: Any) -> generation_pb2.Finish:
        parts = request.composition.adapters or ([request] if request.HasField("adapter_id") else [])
        effective = [
            generation_pb2.EffectiveAdapter(
                adapter_id=part.adapter_id,
                digest="cd" * 32,
                method="lora",
                weight=part.weight if request.composition.adapters else 1,
            )
            for part in parts
        ]
        return generation_pb2.Finish(
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.Usage(prompt_tokens=5, completion_tokens=2),
            seed=request.sampling.seed if request.sampling.HasField("seed") else SEED,
            effective_adapters=effective,
            gates=GATES if request.options.gates else (),
        )


@contextmanager
def running() -> Iterator[tuple[FakeService, str]]:
    """A fake service that listens, and its address."""
    service = FakeService()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    add_GenerationServiceServicer_to_server(service, server)
    add_AdapterServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def _prompt(request: Any) -> str:
    match request.WhichOneof("input"):
        case "messages":
            return request.messages.messages[-1].content
        case "token_ids":
            return " ".join(map(str, request.token_ids.ids))
        case _:
            return request.text


def _logprobs(text: str, request: Any) -> list[generation_pb2.TokenLogprobs]:
    if not request.options.HasField("logprobs"):
        return []
    token = generation_pb2.TokenLogprob(token_id=1, piece=text, logprob=-0.5)
    return [generation_pb2.TokenLogprobs(token=token, top=[token] * request.options.logprobs)]


def _abort(context: Any, error: WeftError) -> None:
    status = status_of(error)
    context.set_trailing_metadata(trailing_metadata(status))
    context.abort(grpc.StatusCode[error.code], status.message)
