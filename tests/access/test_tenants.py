"""Two tenants on one server: neither answers, shows, counts or caches anything of the other's.

What can name an adapter is found in the descriptors, so that a new RPC or field is tested without a new test.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message

from tests.access.callers import client_of
from tests.access.conftest import stored
from tests.reliability.wire import Method, methods
from tests.server.conftest import Sources
from tests.server.live import WAIT_S, Client, LiveServer, Loop
from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference
from weft.adapters.registry import AdapterInfo, Registry, Version
from weft.api.access import token_file
from weft.api.access.principal import Role
from weft.api.access.requirements import SUFFICIENT
from weft.api.access.token import Token
from weft.config import AccessConfig, WeftConfig
from weft.errors import AdapterUnusable
from weft.v1 import adapter_service_pb2, generation_pb2

FOREIGN, UNKNOWN = "secretlora", "nosuchlora"  # of equal lengths
_USER = frozenset({Role.GENERATE, Role.REGISTER})


class Tenants(NamedTuple):
    """A server, and clients of two tenants and of an administrator."""

    live: LiveServer
    acme: Client
    beta: Client
    admin: Client


@pytest.fixture(scope="module")
def config(protected: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> WeftConfig:
    directory = tmp_path_factory.mktemp("tenants")
    access = AccessConfig(token_file=directory / "tokens.json")
    return replace(protected.config, store=directory / "store", access=access)


@pytest.fixture(scope="module")
def tenants(loop: Loop, config: WeftConfig, sources: Sources) -> Iterator[Tenants]:
    given = {name: Token.new() for name in ("acme", "beta", "ops")}
    assert config.access.token_file is not None
    for name, token in given.items():
        roles = frozenset({Role.ADMIN}) if name == "ops" else _USER
        token_file.add(config.access.token_file, stored(token, name, roles))
    live = LiveServer(loop, config)
    tenants = Tenants(live, *(client_of(live.serving.port, token) for token in given.values()))
    tenants.acme.register(FOREIGN, sources("lora-1"))
    yield tenants
    live.stop()


def _paths(descriptor: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the fields that lead to every text that can name an adapter."""
    for field in descriptor.fields:
        if field.message_type is not None:
            yield from ((field, *rest) for rest in _paths(field.message_type))
        elif field.name in ("adapter_id", "restrict", "mask", "expert"):
            yield (field,)


def _put(message: Message, path: tuple[Any, ...], name: str) -> None:
    field, *rest = path
    value = getattr(message, field.name)
    if not rest:
        if field.is_repeated:
            value.append(name)
        else:
            setattr(message, field.name, name)
    else:
        _put(value.add() if field.is_repeated else value, tuple(rest), name)


def _named(method: Method, path: tuple[Any, ...], name: str) -> bytes:
    """Return a request that is good but for the adapter that it names by one of its fields."""
    request = method.request._concrete_class()
    if isinstance(request, generation_pb2.GenerateRequest):
        request.text = "x"
        request.stopping.max_new_tokens = 1
        if path[0].name == "steering":
            request.adapter_id = name  # of a mixture, of which there is none
    _put(request, path, name)
    return request.SerializeToString()


NAMING = {
    f"{method.path.rpartition('/')[2]}-{'.'.join(field.name for field in path)}": (method, path)
    for method in methods()
    for path in _paths(method.request)
    if not method.streams_requests and method.path.rpartition("/")[2] != "RegisterAdapter"
}


def _answer(client: Client, method: Method, data: bytes) -> tuple[Any, ...]:
    """Return everything that a call tells: the messages, or the status with its trailers."""
    try:
        if method.streams_responses:
            return tuple(client.channel.unary_stream(method.path)(data, timeout=WAIT_S))
        return (client.channel.unary_unary(method.path)(data, timeout=WAIT_S),)
    except grpc.RpcError as error:
        trailers = [(one.key, one.value) for one in error.trailing_metadata()]
        return error.code(), error.details(), trailers


def _renamed(told: Any) -> Any:
    """Return what was told with the unknown name in place of the foreign one."""
    if isinstance(told, str):
        return told.replace(FOREIGN, UNKNOWN)
    if isinstance(told, bytes):
        return told.replace(FOREIGN.encode(), UNKNOWN.encode())
    return type(told)(map(_renamed, told)) if isinstance(told, list | tuple) else told


@pytest.mark.parametrize("name", NAMING)
def test_a_foreign_adapter_and_an_unknown_one_are_told_alike(name: str, tenants: Tenants) -> None:
    """Byte for byte but for the name that the caller gave, whichever RPC and field."""
    method, path = NAMING[name]
    foreign, unknown = (_answer(tenants.beta, method, _named(method, path, one)) for one in (FOREIGN, UNKNOWN))
    assert _renamed(foreign) == unknown
    assert len(foreign) == 3, "refused"
    assert "acme" not in str(foreign)
    if Role.ADMIN not in SUFFICIENT[method.path] and path[0].name != "steering":
        own = _answer(tenants.acme, method, _named(method, path, FOREIGN))
        assert own != foreign, "negative control: its owner is told something else"
        if method.path.endswith("UnregisterAdapter"):
            tenants.acme.register(FOREIGN, tenants.live.config.allowed_sources[0] / "lora-1")


def test_every_rpc_with_an_adapter_is_tried() -> None:
    tried = {name.partition("-")[0] for name in NAMING}
    assert tried >= {"Generate", "StreamGenerate", "GetAdapter", "UnregisterAdapter", "LoadAdapter", "UnloadAdapter"}


def test_lists_and_watches_show_a_tenants_own(tenants: Tenants) -> None:
    assert [adapter.adapter_id for adapter in tenants.acme.list().adapters] == [FOREIGN]
    assert list(tenants.beta.list().adapters) == []
    assert [adapter.adapter_id for adapter in tenants.admin.list().adapters] == [f"acme/{FOREIGN}"]
    watch = tenants.beta.adapters.WatchAdapters(adapter_service_pb2.WatchAdaptersRequest(), timeout=WAIT_S)
    assert next(watch).change == adapter_service_pb2.ADAPTER_CHANGE_SYNCED
    tenants.acme.unload(FOREIGN)
    tenants.acme.load(FOREIGN)
    tenants.beta.register("own", tenants.live.config.allowed_sources[0] / "lora-1")
    assert next(watch).adapter.adapter_id == "own", "not what happened to the other's before"
    watch.cancel()
    tenants.beta.unregister("own")


def test_an_id_is_each_tenants_own(tenants: Tenants, sources: Sources) -> None:
    """The same id with other content; neither replaces, sees or removes the other's."""
    before = tenants.acme.tokens(FOREIGN, 8)
    created = tenants.beta.register(FOREIGN, sources("lora-2"))
    assert created.outcome == adapter_service_pb2.REGISTER_OUTCOME_CREATED
    assert created.adapter.adapter_id == FOREIGN
    assert tenants.acme.tokens(FOREIGN, 8) == before
    assert tenants.beta.tokens(FOREIGN, 8) != before
    found = tenants.live.application.lifecycle.store.read_catalog()
    assert {manifest.adapter_id for manifest in found.manifests.values()} == {f"acme/{FOREIGN}", f"beta/{FOREIGN}"}
    assert not found.problems
    assert tenants.admin.get(f"beta/{FOREIGN}").digest == created.adapter.digest
    tenants.beta.unregister(FOREIGN)
    assert tenants.acme.tokens(FOREIGN, 8) == before
    tenants.admin.load(f"acme/{FOREIGN}")


def test_prefixes_are_cached_for_each_tenant(tenants: Tenants) -> None:
    """A cached prefix would answer faster, and so tell that the other tenant sent it."""
    text = "what only one of them has asked so far"
    assert tenants.acme.generate(text=text).finish.usage.cached_prompt_tokens == 0
    assert tenants.acme.generate(text=text).finish.usage.cached_prompt_tokens > 0
    assert tenants.beta.generate(text=text).finish.usage.cached_prompt_tokens == 0


def test_experts_are_those_of_the_mixtures_tenant() -> None:
    registry, digest = Registry(), AdapterDigest("a" * 64)
    registry.publish(Version(adapter_id=AdapterId("acme/lora"), digest=digest, info=AdapterInfo(method="lora")))
    expert = AdapterReference(AdapterId("lora"), digest)
    assert registry.require_expert(expert, tenant="acme").digest == digest
    for other in ("", "beta"):
        with pytest.raises(AdapterUnusable, match="not registered"):
            registry.require_expert(expert, tenant=other)


def test_adapters_of_tenants_survive_a_restart(loop: Loop, tenants: Tenants, config: WeftConfig) -> None:
    """A second server on the same store stands for the restarted one."""
    again = LiveServer(loop, config)
    registered = {version.adapter_id for version in again.application.lifecycle.registry}
    again.stop()
    assert registered == {f"acme/{FOREIGN}"}


def test_one_tenant_leaves_places_to_others(tenants: Tenants) -> None:
    """A crowd of one tenant, for as many adapters as it likes, is refused before the queue is full."""
    admission = tenants.live.application.requests.admission
    most = tenants.live.config.engine.max_num_seqs + tenants.live.config.engine.max_queued_requests
    with tenants.live.gate.held():
        streams, refusals = [], 0
        for _ in itertools.repeat(None, most):
            streams.append(tenants.acme.stream(FOREIGN, 4))
        while admission.num_requests + refusals < most:
            refusals = sum(not stream.is_running for stream in streams)
        assert refusals >= most // 6
        other = tenants.beta.stream(None, 4)
        while admission.num_requests + refusals <= most:
            pass
    assert other.result().tokens
    for stream in streams:
        stream.cancel()
