"""Descriptions of calls for both clients: each function turns arguments into an RPC that is not yet made."""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypedDict, TypeVar, Unpack, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from weft.v1 import adapter_service_pb2, generation_pb2, generation_service_pb2
from weft.v1.adapter_files import FOREIGN_FILES, MIXTURE_FILES, PEFT_FILES, foreign_refused
from weft.v1.adapter_pb2 import Adapter, AdapterResidency, AdapterState
from weft.v1.adapter_service_pb2 import UnregisterMode, UploadAdapterRequest, UploadChunk, UploadFile, UploadHeader
from weft.v1.adapter_service_pb2_grpc import AdapterServiceStub
from weft.v1.generation_pb2 import (
    ChatMessage,
    GenerateRequest,
    Messages,
    Steering,
    StreamGenerateResponse,
    WeightedAdapter,
)
from weft.v1.generation_service_pb2_grpc import GenerationServiceStub
from weft.v1.model_pb2 import ModelInfo

Answer = TypeVar("Answer")
Filled = TypeVar("Filled", bound=Message)

Completion: TypeAlias = generation_pb2.GenerateResponse
Conversation: TypeAlias = Sequence[Mapping[str, str]] | Sequence[ChatMessage]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | Sequence[int] | Conversation
# An adapter, several with weights (or as parts, which also state where they act), or the base.
Target: TypeAlias = str | Mapping[str, float] | Sequence[WeightedAdapter] | None

_PAGE_SIZE = 1000
TIMEOUT_S = 60.0  # of calls that answer at once, if the client has none
_DRAIN_TIMEOUT_S = 30.0  # the server's own, if a call gives none
_CHUNK_BYTES = 1 << 20
_UPLOAD_BYTES_PER_S_MIN = 1 << 20  # an upload may take as long as on the slowest link worth supporting


class Parameters(TypedDict, total=False):
    """Parameters of `generate` and `stream` besides prompt and adapter; None counts as not given.

    All but the last are fields of Sampling, Stopping, ResponseOptions and GenerateRequest, documented there.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    logprobs: int | None
    token_ids: bool | None
    gates: bool | None
    token_gates: bool | None
    steering: Steering | None
    request_id: str | None
    cache_salt: str | None
    timeout_s: float | None  # deadline of this call, overriding the client's


class Stubs(NamedTuple):
    """The stubs of both services, on one channel."""

    generation: GenerationServiceStub
    adapters: AdapterServiceStub

    @classmethod
    def on(cls, channel: Any) -> Self:
        """Return the stubs on a channel of grpc or grpc.aio."""
        return cls(GenerationServiceStub(channel), AdapterServiceStub(channel))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc(Generic[Answer]):
    """One call, not yet made.

    method: selects it from the stubs.
    request: its message, or the iterator of its messages.
    answer: converts the response to the caller's result.
    deadline_s: computes the call's deadline from the client's, which is None if its user set none; None is no deadline.
    """

    method: Callable[[Stubs], Callable[..., Any]]
    request: Message | Iterator[Message]
    answer: Callable[[Any], Answer] = lambda response: response
    deadline_s: Callable[[float | None], float | None] = lambda given: given or TIMEOUT_S


def generate_request(prompt: Prompt, adapter: Target = None, **parameters: Unpack[Parameters]) -> GenerateRequest:
    """Return the message that requests an answer to `prompt`, which is text, tokens or a conversation."""
    given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
    given.pop("timeout_s", None)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]  # otherwise its characters would be the sequence
    request = GenerateRequest(
        sampling=_filled(generation_pb2.Sampling, given),
        stopping=_filled(generation_pb2.Stopping, given),
        options=_filled(generation_pb2.ResponseOptions, given),
    )
    request.MergeFrom(_filled(GenerateRequest, given))
    if given:
        raise TypeError(f"unknown parameters: {', '.join(given)}")
    match prompt:
        case str():
            request.text = prompt
        case [int(), *_] | []:
            request.token_ids.CopyFrom(generation_pb2.TokenIds(ids=cast(Sequence[int], prompt)))
        case _:
            request.messages.CopyFrom(_messages(prompt))
    match adapter:
        case None:
            pass
        case str():
            request.adapter_id = adapter
        case Mapping():
            parts = [WeightedAdapter(adapter_id=name, weight=weight) for name, weight in adapter.items()]
            request.composition.CopyFrom(generation_pb2.Composition(adapters=parts))
        case _:
            request.composition.CopyFrom(generation_pb2.Composition(adapters=adapter))
    return request


def _filled(kind: type[Filled], given: dict[str, Any]) -> Filled:
    """Return a `kind` with those of its fields that `given` has, and remove them from `given`."""
    message = kind()
    for name in kind.DESCRIPTOR.fields_by_name.keys() & given.keys():
        value = given.pop(name)
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: given {value!r}: {error}") from None
    return message


def _messages(turns: Any) -> Messages:
    return Messages(messages=[turn if isinstance(turn, ChatMessage) else ChatMessage(**turn) for turn in turns])


def generate(prompt: Prompt, adapter: Target = None, **parameters: Unpack[Parameters]) -> Rpc[Completion]:
    """Return the whole answer to `prompt`, through one adapter, several with weights, or the base alone."""
    return Rpc(
        method=lambda stubs: stubs.generation.Generate,
        request=generate_request(prompt, adapter, **parameters),
        deadline_s=lambda given: parameters.get("timeout_s") or given,
    )


def stream(prompt: Prompt, adapter: Target = None, **parameters: Unpack[Parameters]) -> Rpc[StreamGenerateResponse]:
    """Stream the answer to `prompt` as it is generated; the stream's `finish` states how it ended."""
    return Rpc(
        method=lambda stubs: stubs.generation.StreamGenerate,
        request=generate_request(prompt, adapter, **parameters),
        deadline_s=lambda given: parameters.get("timeout_s") or given,
    )


def tokenize(text: str | Conversation, *, pieces: bool = False) -> Rpc[generation_service_pb2.TokenizeResponse]:
    """Return the tokens of a text or a conversation; `pieces` adds their spellings."""
    request = generation_service_pb2.TokenizeRequest(pieces=pieces)
    if isinstance(text, str):
        request.text = text
    else:
        request.messages.CopyFrom(_messages(text))
    return Rpc(method=lambda stubs: stubs.generation.Tokenize, request=request)


def model_info() -> Rpc[ModelInfo]:
    """Describe the base model and the limits of the server."""
    return Rpc(
        method=lambda stubs: stubs.generation.GetModelInfo,
        request=generation_service_pb2.GetModelInfoRequest(),
        answer=lambda response: response.model,
    )


def register(
    adapter_id: str,
    source: str,
    *,
    replace: bool = False,
    expected_digest: str | None = None,
    pin: bool = False,
    validate_only: bool = False,
    content_digest: str | None = None,
) -> Rpc[adapter_service_pb2.RegisterAdapterResponse]:
    """Register an adapter from a directory that the server can read; `upload` sends a local one."""
    request = adapter_service_pb2.RegisterAdapterRequest(
        adapter_id=adapter_id,
        source=source,
        replace=replace,
        expected_digest=expected_digest,
        pin=pin,
        validate_only=validate_only,
        content_digest=content_digest,
    )
    return Rpc(method=lambda stubs: stubs.adapters.RegisterAdapter, request=request)


def upload(
    adapter_id: str,
    directory: str | Path,
    *,
    replace: bool = False,
    expected_digest: str | None = None,
    pin: bool = False,
    validate_only: bool = False,
    progress: Callable[[int, int], None] = lambda sent_bytes, size_bytes: None,
) -> Rpc[adapter_service_pb2.UploadAdapterResponse]:
    """Register an adapter by sending the two files of a local directory, PEFT's or a mixture's.

    progress: called with the bytes sent and the bytes of both files, possibly in another thread. Raises OSError for a
    directory without these files.
    """
    is_mixture = (Path(directory) / MIXTURE_FILES.config).exists()
    if not is_mixture and not (Path(directory) / PEFT_FILES.weights).exists():
        for foreign in (Path(directory) / name for name in FOREIGN_FILES):
            if foreign.exists():
                raise FileNotFoundError(errno.ENOENT, foreign_refused(foreign.name), str(foreign))
    files = [_upload_file(Path(directory) / name) for name in (MIXTURE_FILES if is_mixture else PEFT_FILES)]
    header = UploadHeader(
        adapter_id=adapter_id,
        files=files,
        replace=replace,
        expected_digest=expected_digest,
        pin=pin,
        validate_only=validate_only,
    )
    size_bytes = sum(file.size_bytes for file in files)
    return Rpc(
        method=lambda stubs: stubs.adapters.UploadAdapter,
        request=_upload_messages(header, Path(directory), lambda sent_bytes: progress(sent_bytes, size_bytes)),
        deadline_s=lambda given: (given or TIMEOUT_S) + size_bytes / _UPLOAD_BYTES_PER_S_MIN,
    )


def _upload_file(path: Path) -> UploadFile:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return UploadFile(name=path.name, size_bytes=file.tell(), sha256=sha256)


def _upload_messages(
    header: UploadHeader, directory: Path, progress: Callable[[int], None]
) -> Iterator[UploadAdapterRequest]:
    """Yield the header, then the chunks. The server detects a file that changed after it was hashed."""
    yield UploadAdapterRequest(header=header)
    sent_bytes = 0
    for index, declared in enumerate(header.files):
        offset = 0
        with (directory / declared.name).open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                yield UploadAdapterRequest(chunk=UploadChunk(file_index=index, offset=offset, data=data))
                offset += len(data)
                sent_bytes += len(data)
                progress(sent_bytes)


def unregister(
    adapter_id: str,
    *,
    cancel: bool = False,
    drain_timeout_s: float | None = None,
    allow_missing: bool = False,
    expected_digest: str | None = None,
) -> Rpc[adapter_service_pb2.UnregisterAdapterResponse]:
    """Remove an adapter; its requests finish within `drain_timeout_s`, or end at once with `cancel`."""
    timeout = None
    if drain_timeout_s is not None:
        timeout = Duration()
        timeout.FromNanoseconds(round(drain_timeout_s * 1e9))
    drain_s = _DRAIN_TIMEOUT_S if drain_timeout_s is None else drain_timeout_s
    request = adapter_service_pb2.UnregisterAdapterRequest(
        adapter_id=adapter_id,
        mode=UnregisterMode.UNREGISTER_MODE_CANCEL if cancel else UnregisterMode.UNREGISTER_MODE_DRAIN,
        timeout=timeout,
        allow_missing=allow_missing,
        expected_digest=expected_digest,
    )
    return Rpc(
        method=lambda stubs: stubs.adapters.UnregisterAdapter,
        request=request,
        deadline_s=lambda given: (given or TIMEOUT_S) + drain_s,
    )


def adapter(adapter_id: str) -> Rpc[Adapter]:
    """Return one registered adapter, by its id or by "id@digest"."""
    return Rpc(
        method=lambda stubs: stubs.adapters.GetAdapter,
        request=adapter_service_pb2.GetAdapterRequest(adapter_id=adapter_id),
        answer=lambda response: response.adapter,
    )


def page(method: str, state: str, page_token: str) -> Rpc[adapter_service_pb2.ListAdaptersResponse]:
    """Return a page of all adapters, or of those with one method ("lora") and one state ("active"); "" is the first."""
    request = adapter_service_pb2.ListAdaptersRequest(page_size=_PAGE_SIZE, method=method, page_token=page_token)
    if state:
        request.state = _enum(AdapterState, "state", state)
    return Rpc(method=lambda stubs: stubs.adapters.ListAdapters, request=request)


def load(adapter_id: str, residency: str = "device", *, pin: bool | None = None) -> Rpc[Adapter]:
    """Bring an adapter to the "device" or into "host" memory; `pin` sets or removes its pin."""
    return Rpc(
        method=lambda stubs: stubs.adapters.LoadAdapter,
        request=adapter_service_pb2.LoadAdapterRequest(
            adapter_id=adapter_id, residency=_enum(AdapterResidency, "residency", residency), pin=pin
        ),
        answer=lambda response: response.adapter,
    )


def unload(adapter_id: str, residency: str = "disk") -> Rpc[Adapter]:
    """Take an adapter and its pin out of memory; "host" keeps the copy there."""
    return Rpc(
        method=lambda stubs: stubs.adapters.UnloadAdapter,
        request=adapter_service_pb2.UnloadAdapterRequest(
            adapter_id=adapter_id, residency=_enum(AdapterResidency, "residency", residency)
        ),
        answer=lambda response: response.adapter,
    )


def lift_quarantine(adapter_id: str, *, expected_digest: str | None = None) -> Rpc[Adapter]:
    """Put an adapter in service again that was quarantined."""
    return Rpc(
        method=lambda stubs: stubs.adapters.LiftQuarantine,
        request=adapter_service_pb2.LiftQuarantineRequest(adapter_id=adapter_id, expected_digest=expected_digest),
        answer=lambda response: response.adapter,
    )


def _enum(enum: Any, field: str, label: str) -> Any:
    """Return the value that `label` names without its enum's prefix: "active" is ADAPTER_STATE_ACTIVE."""
    unset, *names = enum.keys()
    prefix = unset.removesuffix("UNSPECIFIED")
    values = {name.removeprefix(prefix).lower(): enum.Value(name) for name in names}
    if label not in values:
        raise ValueError(f"{field} must be one of {', '.join(values)}, given {label!r}")
    return values[label]


def watch() -> Rpc[adapter_service_pb2.WatchAdaptersResponse]:
    """Watch the registered adapters, then their changes, until one side ends it; there is no deadline."""
    return Rpc(
        method=lambda stubs: stubs.adapters.WatchAdapters,
        request=adapter_service_pb2.WatchAdaptersRequest(),
        deadline_s=lambda given: None,
    )
