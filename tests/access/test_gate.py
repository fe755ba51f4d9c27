"""Every RPC of a server with tokens: who is let in, who is refused how, and what a refusal costs and reveals."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.access.conftest import ROLES, bearer, stored
from tests.server.conftest import Sources
from tests.server.files import upload_messages
from tests.server.live import WAIT_S, LiveServer, refused
from weft.api.access import token_file
from weft.api.access.gate import AccessGate
from weft.api.access.principal import ANYBODY, CALLER, Principal, Role, Via
from weft.api.access.requirements import MUTATIONS, PUBLIC, SUFFICIENT
from weft.api.access.token import Token
from weft.api.access.tokens import Tokens
from weft.api.interceptors import FinishedCall, StatusInterceptor
from weft.v1 import adapter_service_pb2, generation_service_pb2
from weft.v1.status_details import DETAILS_KEY

SERVICES: list[ServiceDescriptor] = [
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
RPCS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
HEALTH = "/grpc.health.v1.Health/Check"
REFUSALS = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
NAMES = (*ROLES, "expired", "unknown", "none")


def unlisted(rpcs: Collection[str], listed: Collection[str]) -> set[str]:
    return set(rpcs) - set(listed)


def test_every_rpc_is_listed() -> None:
    assert unlisted(RPCS, {*SUFFICIENT, *PUBLIC}) == set()
    assert unlisted({*SUFFICIENT, *PUBLIC}, RPCS) == set()
    changes = (f"{change}Adapter" for change in ("Register", "Upload", "Unregister", "Load", "Unload"))
    assert {rpc.rpartition("/")[2] for rpc in MUTATIONS} == {*changes, "LiftQuarantine"}


def test_an_rpc_that_is_not_listed_is_seen() -> None:
    """Negative control."""
    assert unlisted([*RPCS, "/weft.v1.AdapterService/New"], {*SUFFICIENT, *PUBLIC}) == {"/weft.v1.AdapterService/New"}


def test_the_server_has_no_other_services(protected: LiveServer, tokens: dict[str, Token]) -> None:
    call = protected.client.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(call(iter([request]), timeout=WAIT_S, metadata=bearer(tokens["generate"])))
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {service.full_name for service in SERVICES}


def called(
    channel: grpc.Channel, rpc: str, body: bytes = b"", metadata: Any = (), timeout: float = WAIT_S
) -> grpc.RpcError | None:
    """Call an RPC with these bytes as its first message; return how it failed, or None after its first answer."""
    method = RPCS[rpc]
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    request: Any = iter([body]) if method.client_streaming else body
    try:
        answer: Any = kind(rpc)(request, timeout=timeout, metadata=metadata)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return error
    return None


def code_of(error: grpc.RpcError | None) -> str:
    return "OK" if error is None else error.code().name  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rpc", RPCS)
def test_each_token_at_each_rpc(rpc: str, name: str, protected: LiveServer, tokens: dict[str, Token]) -> None:
    metadata = () if name == "none" else bearer(tokens[name])
    code = code_of(called(protected.client.channel, rpc, metadata=metadata))
    _, roles = ROLES.get(name, ("", frozenset()))
    if rpc == HEALTH:
        assert code == "OK"
    elif not roles:
        assert code == "UNAUTHENTICATED"
    elif roles.isdisjoint(SUFFICIENT[rpc] | {Role.ADMIN}):
        assert code == "PERMISSION_DENIED"
    else:
        assert code in {"OK", "INVALID_ARGUMENT"}, "it was let in, and found the empty message wanting"


def test_the_texts_and_details(protected: LiveServer, tokens: dict[str, Token]) -> None:
    adapters, list_request = protected.client.adapters, adapter_service_pb2.ListAdaptersRequest()

    def listing(*metadata: tuple[str, str | bytes]) -> Callable[[], object]:
        return lambda: adapters.ListAdapters(list_request, timeout=WAIT_S, metadata=metadata)

    refused(listing(), "UNAUTHENTICATED", "TOKEN_MISSING", "authorization: must be Bearer and a token", retry=False)
    good = tokens["generate"].spelled()
    for value in (good, f"Basic {good}", "Bearer ", f"Bearer {good}0", f"Bearer  {good}", "Bearer null", ""):
        malformed = listing(("authorization", value))
        refused(malformed, "UNAUTHENTICATED", "TOKEN_MALFORMED", "Bearer weft_<id>_<secret>", retry=False)
    twice = bearer(tokens["generate"]) * 2
    refused(listing(*twice), "UNAUTHENTICATED", "TOKEN_MALFORMED")
    refused(listing(*bearer(tokens["unknown"])), "UNAUTHENTICATED", "TOKEN_INVALID", "or has expired", retry=False)
    register = lambda: adapters.RegisterAdapter(  # noqa: E731
        adapter_service_pb2.RegisterAdapterRequest(), timeout=WAIT_S, metadata=bearer(tokens["generate"])
    )
    failure = refused(
        register, "PERMISSION_DENIED", "ROLE_REQUIRED", "one of the roles register, or admin", retry=False
    )
    assert failure.metadata == {"required": "register", "given": "generate"}
    adapters.ListAdapters(list_request, timeout=WAIT_S, metadata=(("authorization", f"bearer {good}"),))  # control


def test_nothing_is_learned_from_a_refusal(protected: LiveServer, tokens: dict[str, Token]) -> None:
    """An unknown id, a wrong secret and an expired token get the same bytes, from every RPC."""
    known, unknown = tokens["generate"], tokens["unknown"]
    wrong = known._replace(secret=unknown.secret)
    for rpc in sorted(RPCS.keys() - PUBLIC):
        answers = set()
        for token in (unknown, wrong, tokens["expired"]):
            error: Any = called(protected.client.channel, rpc, metadata=bearer(token))
            trailers = dict(error.trailing_metadata())
            answers.add((error.code(), error.details(), trailers[DETAILS_KEY]))
        assert len(answers) == 1, rpc


def test_a_refused_request_is_not_parsed(protected: LiveServer, tokens: dict[str, Token]) -> None:
    for rpc in sorted(RPCS.keys() - PUBLIC):
        assert code_of(called(protected.client.channel, rpc, b"\xff\xff\xff")) == "UNAUTHENTICATED", rpc
        if RPCS[rpc].client_streaming:
            continue
        let_in = called(protected.client.channel, rpc, b"\xff\xff\xff", bearer(tokens["admin"]))
        assert code_of(let_in) == "INTERNAL", "control: these bytes are no message"


def test_a_refused_upload_is_not_received(protected: LiveServer, tokens: dict[str, Token], sources: Sources) -> None:
    sent = []

    def endless() -> Iterator[Any]:
        while True:
            sent.append(time.monotonic())
            yield adapter_service_pb2.UploadAdapterRequest(chunk=adapter_service_pb2.UploadChunk(data=bytes(1 << 20)))

    for metadata, code, reason in (
        ((), "UNAUTHENTICATED", "TOKEN_MISSING"),
        (bearer(tokens["generate"]), "PERMISSION_DENIED", "ROLE_REQUIRED"),
    ):
        sent.clear()
        upload = protected.client.adapters.UploadAdapter
        refused(lambda: upload(endless(), timeout=WAIT_S, metadata=metadata), code, reason)  # noqa: B023
        assert len(sent) < 64, "flow control holds the rest back"
    messages = upload_messages("uploaded", sources.parts("lora-3").files())
    metadata = bearer(tokens["register"])
    protected.client.adapters.UploadAdapter(iter(messages), timeout=WAIT_S, metadata=metadata)  # control
    request = adapter_service_pb2.UnregisterAdapterRequest(adapter_id="uploaded")
    protected.client.adapters.UnregisterAdapter(request, timeout=WAIT_S, metadata=metadata)


def test_a_huge_token_changes_nothing(protected: LiveServer, tokens: dict[str, Token]) -> None:
    error = called(protected.client.channel, HEALTH, metadata=bearer("x" * (64 << 10)))
    assert code_of(error) in {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"}  # gRPC's own, by its limit of headers
    rpc = "/weft.v1.AdapterService/ListAdapters"
    assert code_of(called(protected.client.channel, rpc, metadata=bearer("x" * 4000))) == "UNAUTHENTICATED"
    assert code_of(called(protected.client.channel, rpc, metadata=bearer(tokens["generate"]))) == "OK"


def test_refusals_are_counted_by_reason(protected: LiveServer, tokens: dict[str, Token]) -> None:
    def counted() -> dict[str, float]:
        samples = protected.scrape()["weft_access_refusals"].samples
        return {sample.labels["reason"]: sample.value for sample in samples if sample.name.endswith("_total")}

    before = counted()
    assert before.keys() == {"TOKEN_MISSING", "TOKEN_MALFORMED", "TOKEN_INVALID", "ROLE_REQUIRED"}
    rpc = "/weft.v1.AdapterService/UnloadAdapter"
    for metadata in ((), bearer("x"), bearer(tokens["unknown"]), bearer(tokens["expired"]), bearer(tokens["generate"])):
        called(protected.client.channel, rpc, metadata=metadata)
    after = counted()
    assert {reason: after[reason] - before[reason] for reason in after} == {
        "TOKEN_MISSING": 1,
        "TOKEN_MALFORMED": 1,
        "TOKEN_INVALID": 2,
        "ROLE_REQUIRED": 1,
    }


def test_health_says_the_status_and_nothing_else(protected: LiveServer) -> None:
    check = protected.client.channel.unary_unary(HEALTH)
    answer, call = check.with_call(b"", timeout=WAIT_S)
    assert answer == health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
    assert {key for key, _ in call.trailing_metadata()} <= {"content-type"}


def test_a_running_server_follows_its_token_file(
    protected: LiveServer, tokens_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A new token is accepted and a removed one refused within two seconds; a broken file changes nothing."""
    token, rpc = Token.new(), "/weft.v1.AdapterService/ListAdapters"

    def code() -> str:
        return code_of(called(protected.client.channel, rpc, metadata=bearer(token)))

    def becomes(wanted: str) -> float:
        started = time.monotonic()
        while code() != wanted:
            assert time.monotonic() - started < 5
            time.sleep(0.05)
        return time.monotonic() - started

    assert code() == "UNAUTHENTICATED"
    token_file.add(tokens_path, stored(token))
    assert becomes("OK") < 2
    content = tokens_path.read_bytes()
    tokens_path.write_bytes(b"{")
    protected.serving.access.hurry()
    give_up_at = time.monotonic() + 5
    while "stay valid" not in caplog.text:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    assert code() == "OK"
    tokens_path.write_bytes(content)
    token_file.remove(tokens_path, token.token_id)
    assert becomes("UNAUTHENTICATED") < 2


# A server of test handlers, for what the services cannot show.


async def whoami(request: bytes, context: Any) -> bytes:
    await asyncio.sleep(0.005)  # so that calls overlap
    caller = CALLER.get()
    return f"{caller.tenant}:{caller.token_id}:{caller.via}".encode()


async def whoami_streamed(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield await whoami(request, context)


@pytest.fixture
async def small(tokens_path: Any) -> AsyncIterator[Callable[[Tokens | None], Any]]:
    """Yield a function that starts a server of test handlers behind the interceptors, and returns a channel to it."""
    servers, channels = [], []

    async def start(tokens: Tokens | None) -> grpc.aio.Channel:
        finished: list[FinishedCall] = []
        server = grpc.aio.server(interceptors=[StatusInterceptor(finished.append), AccessGate(tokens, lambda _: None)])
        handlers = {
            "Generate": grpc.unary_unary_rpc_method_handler(whoami),
            "StreamGenerate": grpc.unary_stream_rpc_method_handler(whoami_streamed),
            "New": grpc.unary_unary_rpc_method_handler(whoami),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("weft.v1.GenerationService", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return channels[-1]

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(None)


async def test_handlers_know_their_caller(
    small: Callable[[Tokens | None], Any], tokens_path: Any, tokens: dict[str, Token]
) -> None:
    channel = await small(Tokens(tokens_path))
    wanted = {
        name: f"{ROLES[name][0]}:{tokens[name].token_id}:token".encode() for name in ("generate", "admin", "both")
    }
    unary = channel.unary_unary("/weft.v1.GenerationService/Generate")
    streamed = channel.unary_stream("/weft.v1.GenerationService/StreamGenerate")

    async def one(name: str, is_streamed: bool) -> None:
        metadata = bearer(tokens[name])
        answers = [part async for part in streamed(b"", metadata=metadata)] if is_streamed else []
        answers.append(await unary(b"", metadata=metadata))
        assert set(answers) == {wanted[name]}

    await asyncio.gather(*(one(name, streams) for _ in range(20) for name in wanted for streams in (True, False)))


async def test_without_tokens_every_caller_has_all_rights(small: Callable[[Tokens | None], Any]) -> None:
    channel = await small(None)
    assert await channel.unary_unary("/weft.v1.GenerationService/Generate")(b"") == b"::open"
    assert Principal(tenant="", roles=frozenset(Role), token_id="", via=Via.OPEN) == ANYBODY
    with pytest.raises(LookupError):
        CALLER.get()  # outside of a call there is no caller


@pytest.mark.parametrize("has_tokens", [True, False])
async def test_an_rpc_that_is_not_listed_is_refused(
    small: Callable[[Tokens | None], Any], tokens_path: Any, tokens: dict[str, Token], has_tokens: bool
) -> None:
    channel = await small(Tokens(tokens_path) if has_tokens else None)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary("/weft.v1.GenerationService/New")(b"", metadata=bearer(tokens["admin"]))
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError) as absent:
        await channel.unary_unary("/weft.v1.GenerationService/Absent")(b"", metadata=bearer(tokens["admin"]))
    assert absent.value.code() is grpc.StatusCode.UNIMPLEMENTED
