"""Messages as an attacker writes them: for every field of every RPC's request, as much of it as a message can hold.

The bytes are written by hand from the descriptors, because protobuf's own classes would make an object for each entry.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from weft.v1 import adapter_service_pb2, generation_pb2, generation_service_pb2

SERVICES = (
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"],
)
UNKNOWN = "unknown"
_UNKNOWN_NUMBER = 2000
_VALID_BESIDE: dict[str, bytes] = {  # so that a request is not refused for something else
    "weft.v1.GenerateRequest": generation_pb2.GenerateRequest(text="x").SerializeToString(),
    "weft.v1.TokenizeRequest": generation_service_pb2.TokenizeRequest(text="x").SerializeToString(),
}
_FIXED_64, _FIXED_32 = (FieldDescriptor.TYPE_DOUBLE,), (FieldDescriptor.TYPE_FLOAT,)


class Method(NamedTuple):
    """An RPC. path: as it is called on the wire."""

    path: str
    request: Any
    streams_requests: bool
    streams_responses: bool


class Bomb(NamedTuple):
    """A message that is full of one field. path: of the field, without indices. is_repeated: of the field itself."""

    method: Method
    path: str
    field: FieldDescriptor | None
    data: bytes

    @property
    def is_repeated(self) -> bool:
        return self.field is not None and self.field.is_repeated

    def __str__(self) -> str:
        return f"{self.method.path.rpartition('/')[2]}-{self.path}"


def methods() -> list[Method]:
    """Return every RPC of this project."""
    return [
        Method(
            f"/{service.full_name}/{method.name}",
            method.input_type,
            method.client_streaming,
            method.server_streaming,
        )
        for service in SERVICES
        for method in service.methods
    ]


def bombs(size: int) -> Iterator[Bomb]:
    """Yield a message of about `size` bytes for every field that a request reaches, and one of an unknown field."""
    for method in methods():
        beside = _VALID_BESIDE.get(method.request.full_name, b"")
        for path, fields in _paths(method.request, ()):
            data = _filled(fields, size - len(beside))
            in_input = fields[0].containing_oneof is not None and fields[0].containing_oneof.name == "input"
            yield Bomb(method, path, fields[-1], data if in_input else beside + data)
        yield Bomb(method, UNKNOWN, None, beside + _entries(_tag(_UNKNOWN_NUMBER, 2) + b"\x00", size - len(beside)))


def with_entries(fields: tuple[FieldDescriptor, ...], count: int) -> bytes:
    """Return a message with `count` entries of the last of `fields`, which is repeated."""
    return _nested(fields[:-1], _one(fields[-1]) * count)


def repeated() -> Iterator[tuple[Method, str, tuple[FieldDescriptor, ...]]]:
    """Yield every repeated field that a request reaches, with the fields that lead to it."""
    for method in methods():
        for path, fields in _paths(method.request, ()):
            if fields[-1].is_repeated:
                yield method, path, fields


def _paths(descriptor: Any, before: tuple[FieldDescriptor, ...]) -> Iterator[tuple[str, tuple[FieldDescriptor, ...]]]:
    for field in descriptor.fields:
        fields = (*before, field)
        yield ".".join(one.name for one in fields), fields
        if field.message_type is not None:
            yield from _paths(field.message_type, fields)


def _filled(fields: tuple[FieldDescriptor, ...], size: int) -> bytes:
    room = size - 8 * len(fields)
    if fields[-1].type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES) and not fields[-1].is_repeated:
        content = _tag(fields[-1].number, 2) + _varint(room) + b"a" * room
    else:
        content = _entries(_one(fields[-1]), room)
    return _nested(fields[:-1], content)


def _nested(fields: tuple[FieldDescriptor, ...], content: bytes) -> bytes:
    for field in reversed(fields):
        content = _tag(field.number, 2) + _varint(len(content)) + content
    return content


def _one(field: FieldDescriptor) -> bytes:
    """Return the shortest entry of a field."""
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE):
        return _tag(field.number, 2) + b"\x00"
    if field.type in _FIXED_64:
        return _tag(field.number, 1) + bytes(8)
    if field.type in _FIXED_32:
        return _tag(field.number, 5) + bytes(4)
    return _tag(field.number, 0) + b"\x01"


def _entries(entry: bytes, size: int) -> bytes:
    return entry * (size // len(entry))


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def parsed(method: Method, data: bytes) -> Message:
    """Return the message that a server parses."""
    return method.request._concrete_class.FromString(data)
