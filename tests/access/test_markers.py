"""No prompt, secret or path of a caller is found again: markers in every call, and a search of every output."""

import json
import secrets
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.access.conftest import bearer, stored
from tests.access.test_gate import PUBLIC, RPCS, called
from tests.server.conftest import Sources
from tests.server.files import upload_messages
from tests.server.live import WAIT_S, wait_until
from tests.server.test_serve_process import Started
from weft.api.access import token_file
from weft.api.access.audit_chain import verify
from weft.api.access.principal import Role
from weft.api.access.token import Token
from weft.v1 import adapter_service_pb2, generation_pb2, generation_service_pb2

PROMPT, PATH, OWN_PATH = (f"marker-{name}-{secrets.token_hex(4)}" for name in ("prompt", "path", "own"))
_NAMES = {"adapter_id", "request_id", "expected_digest", "content_digest", "page_token", "method", "sha256"}


def filled(message: Message, depth: int = 4) -> Message:
    """Set every text of a message to a marker: paths to `PATH`, others to `PROMPT`, and leave names empty."""
    for field in message.DESCRIPTOR.fields:
        text = PATH if field.name in ("source", "name") else PROMPT
        if field.type == FieldDescriptor.TYPE_MESSAGE and depth and not field.message_type.GetOptions().map_entry:
            part = getattr(message, field.name)
            filled(part.add() if field.is_repeated else part, depth - 1)
        elif field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, field.name, text.encode())
        elif field.type == FieldDescriptor.TYPE_STRING and field.name not in _NAMES:
            if field.is_repeated:
                getattr(message, field.name).append(text)
            else:
                setattr(message, field.name, text)
    return message


def request_of(rpc: str) -> Message:
    modules = (generation_pb2, generation_service_pb2, adapter_service_pb2)
    name = RPCS[rpc].input_type.name
    kind = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
    return generation_pb2.GenerateRequest() if kind is None else kind()


def found(outputs: Mapping[str, str], markers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (output, name of the marker) for each marker that an output holds."""
    return [(where, name) for where, text in outputs.items() for name, marker in markers.items() if marker in text]


def texts_of(error: grpc.RpcError | None) -> Iterator[str]:
    if error is not None:
        yield str(error.details())  # pyright: ignore[reportAttributeAccessIssue]
        for key, value in error.trailing_metadata() or ():  # pyright: ignore[reportAttributeAccessIssue]
            yield f"{key}: {value.decode(errors='replace') if isinstance(value, bytes) else value}"


def test_nothing_of_a_caller_is_found_again(start: Started, sources: Sources, tmp_path: Path) -> None:
    own = tmp_path / OWN_PATH
    own.mkdir()
    tokens = {"admin": Token.new(), "generate": Token.new(), "unknown": Token.new()}
    for name in ("admin", "generate"):
        token_file.add(own / "tokens.json", stored(tokens[name], roles=frozenset({Role(name)})))
    audit = own / "audit.log"
    allowed = tmp_path / "allowed"
    registered = sources.parts("lora-8").files().write(allowed / PATH)
    process = start(
        *("--log-level", "debug", "--allowed-source", str(allowed)),
        *("--token-file", str(own / "tokens.json"), "--audit-log-file", str(audit)),
    )
    process.wait_ready()
    channel, errors = process.client.channel, []

    for rpc in sorted(RPCS):
        for metadata in ((), *(bearer(token) for token in tokens.values()), bearer(tokens["admin"].secret)):
            for body in (filled(request_of(rpc)).SerializeToString(), PROMPT.encode(), b""):
                errors += texts_of(called(channel, rpc, body, metadata))
    assert RPCS.keys() >= PUBLIC

    admin: dict[str, Any] = {"timeout": WAIT_S, "metadata": bearer(tokens["admin"])}
    adapters, generation = process.client.adapters, process.client.generation
    register = adapter_service_pb2.RegisterAdapterRequest
    adapters.RegisterAdapter(register(adapter_id="marked", source=str(registered)), **admin)
    parts = sources.parts("lora-9")
    files = parts._replace(metadata={**parts.metadata, "note": PROMPT}).configured(base_model_name_or_path=PROMPT)
    adapters.UploadAdapter(upload_messages("uploaded", files), **admin)
    for source in (f"/{PATH}", f"../{PATH}", f"https://user:{PATH}@example.org", str(own), str(audit)):
        with pytest.raises(grpc.RpcError) as error:
            adapters.RegisterAdapter(register(adapter_id="other", source=source), **admin)
        errors += [text for text in texts_of(error.value) if OWN_PATH not in source]
    for name in (tokens["admin"].spelled(), PROMPT + " and more"):  # a secret in the place of a name
        unregister = adapter_service_pb2.UnregisterAdapterRequest(adapter_id=name)
        metadata = (*admin["metadata"], ("x-request-id", name))
        with pytest.raises(grpc.RpcError):
            adapters.UnregisterAdapter(unregister, timeout=WAIT_S, metadata=metadata)
    answer = generation.Generate(process.client.request("marked", text=PROMPT, cache_salt=PROMPT), **admin)
    assert answer.finish.usage.completion_tokens
    for adapter_id in ("marked", "uploaded"):
        adapters.UnregisterAdapter(adapter_service_pb2.UnregisterAdapterRequest(adapter_id=adapter_id), **admin)
    wait_until(lambda: audit.read_text().count('"rpc":"UnregisterAdapter","tenant":"acme"') >= 3)

    with urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics", timeout=WAIT_S) as exposition:
        metrics = exposition.read().decode()
    secret = {f"secret of {name}": token.secret for name, token in tokens.items()}
    hashes = {f"hash of {name}": token.sha256 for name, token in tokens.items()}
    outputs = {"log": process.log, "metrics": metrics, "audit log": audit.read_text()}
    assert found(outputs, {"prompt": PROMPT, "path": PATH} | secret | hashes) == []
    errors_text = {"errors": "\n".join(errors)}
    assert found(errors_text, {"prompt": PROMPT, "own path": OWN_PATH} | secret | hashes) == []
    # Controls: the search finds what is planted, the log is on, and each output holds what it should.
    planted = {**outputs, **errors_text, "log": outputs["log"] + tokens["admin"].spelled()}
    assert found(planted, secret) == [("log", "secret of admin")]
    assert " DEBUG " in outputs["log"]
    assert 'weft_access_refusals_total{reason="TOKEN_INVALID"}' in metrics
    assert len(errors) > 100
    assert "TOKEN_INVALID" in errors_text["errors"] or "has expired" in errors_text["errors"]
    with audit.open("rb") as lines:
        assert verify(lines).seq > 10
    recorded = [json.loads(line) for line in audit.read_text().splitlines()]
    assert {entry["token_id"] for entry in recorded if entry["event"] == "rpc"} == {tokens["admin"].token_id}
