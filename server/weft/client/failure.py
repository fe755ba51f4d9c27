"""A failed call as a typed record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from weft.v1.status_details import DETAILS_KEY, DOMAIN

Detail = TypeVar("Detail", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed call, as a client sees it.

    reason: for programs to compare; "" if the status is not Weft's but gRPC's own or a proxy's.
    metadata: the variable parts of the message.
    retry_after_s: set only if the same call can succeed later.
    """

    code: grpc.StatusCode
    reason: str = ""
    message: str
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    retry_after_s: float | None = None


def failure_of(error: grpc.RpcError) -> Failure:
    """Parse `error`, raised by a call of grpc or grpc.aio, without raising on a malformed status."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Failure(code=grpc.StatusCode.UNKNOWN, message=str(error))
    code, message = error.code(), error.details() or ""
    trailers = dict(error.trailing_metadata() or ())
    packed = trailers.get(DETAILS_KEY)
    try:
        status = Status.FromString(packed) if isinstance(packed, bytes) else Status()
        infos = [info for info in _unpacked(status, error_details_pb2.ErrorInfo) if info.domain == DOMAIN]
        retries = _unpacked(status, error_details_pb2.RetryInfo)
    except DecodeError:
        return Failure(code=code, message=message)
    if not infos or status.code != code.value[0]:
        return Failure(code=code, message=message)
    return Failure(
        code=code,
        reason=infos[0].reason,
        message=message,
        metadata=MappingProxyType(dict(infos[0].metadata)),
        retry_after_s=retries[0].retry_delay.ToNanoseconds() / 1e9 if retries else None,
    )


def _unpacked(status: Status, kind: type[Detail]) -> list[Detail]:
    """Return the details of one kind. Raises DecodeError if one of them is malformed."""
    name = kind.DESCRIPTOR.full_name
    return [kind.FromString(detail.value) for detail in status.details if detail.TypeName() == name]
