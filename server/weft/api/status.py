"""Turn a WeftError into a gRPC status, with the details that `weft.v1.status_details` lists.

Every variable part is cut, so that both trailers together stay below the 8 KiB that peers accept. This counts bytes on
the wire, where the text is percent-encoded and the details are base64.
"""

from itertools import islice

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2
from google.rpc.status_pb2 import Status

from weft.errors import Code, WeftError
from weft.v1.status_details import DETAILS_KEY, DOMAIN

ADAPTER_RESOURCE = "weft.v1.Adapter"

_MESSAGE_BYTES_MAX = 512
_FIELD_BYTES_MAX = 256
_METADATA_ENTRIES_MAX = 16
_METADATA_BYTES_MAX = 72  # of a key, and of a value
_RETRY_S_MAX = 86_400.0


def status_of(error: WeftError) -> Status:
    """Return `error` as google.rpc.Status."""
    message = _clipped(error.message, _MESSAGE_BYTES_MAX)
    metadata = {
        _clipped(key, _METADATA_BYTES_MAX): _clipped(value, _METADATA_BYTES_MAX)
        for key, value in islice(error.metadata.items(), _METADATA_ENTRIES_MAX)
    }
    reason = _clipped(error.reason, _METADATA_BYTES_MAX)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)]
    if error.code is Code.INVALID_ARGUMENT and error.field:
        field = _clipped(error.field, _FIELD_BYTES_MAX)
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message, reason=reason)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(min(max(error.retry_after_s, 0.0), _RETRY_S_MAX) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.code is Code.RESOURCE_EXHAUSTED and not metadata.keys().isdisjoint({"quota", "subject"}):
        full = error_details_pb2.QuotaFailure.Violation(
            subject=metadata.get("subject", ""), description=message, quota_id=metadata.get("quota", "")
        )
        details.append(error_details_pb2.QuotaFailure(violations=[full]))
    if error.code is Code.NOT_FOUND and "adapter_id" in metadata:
        name = metadata["adapter_id"]
        details.append(error_details_pb2.ResourceInfo(resource_type=ADAPTER_RESOURCE, resource_name=name))
    status = Status(code=code_pb2.Code.Value(error.code), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def trailing_metadata(status: Status) -> tuple[tuple[str, bytes]]:
    """Return the trailer that carries `status`, beside the code and the text, which gRPC sends by itself."""
    return ((DETAILS_KEY, status.SerializeToString(deterministic=True)),)


def _clipped(text: str, bytes_max: int) -> str:
    """Return `text` as valid UTF-8 of at most `bytes_max` bytes, with an ellipsis if it was cut."""
    encoded = text[: bytes_max + 1].encode("utf-8", "backslashreplace")
    if len(encoded) <= bytes_max:
        return encoded.decode()
    return encoded[: bytes_max - len("…".encode())].decode("utf-8", "ignore") + "…"
