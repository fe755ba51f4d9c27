"""Every error that Weft raises on purpose.

    WeftError
    ├── InvalidRequest        INVALID_ARGUMENT    a field breaks its rule
    │   └── InvalidAdapter    INVALID_ARGUMENT    an adapter's files break a rule
    ├── Unauthenticated       UNAUTHENTICATED     no token, or none that identifies the caller
    ├── PermissionDenied      PERMISSION_DENIED   the caller is known, and lacks a role
    ├── AdapterNotFound       NOT_FOUND           no such adapter id or digest
    ├── AdapterExists         ALREADY_EXISTS      the id is taken and replacing was not requested
    ├── AdapterConflict       ABORTED             lost a race: stale expected digest, unregistered while queued
    ├── AdapterUnusable       FAILED_PRECONDITION the adapter is loading, draining, quarantined, of another base
    ├── Overloaded            RESOURCE_EXHAUSTED  a queue, quota or pool is full
    ├── DeadlineExceeded      DEADLINE_EXCEEDED   the caller's time ran out
    ├── Cancelled             CANCELLED           the caller went away
    ├── Unavailable           UNAVAILABLE         draining, or the engine is gone; another attempt elsewhere is safe
    └── DataLoss              DATA_LOSS           a stored blob no longer has its digest

An error is transport-free. It carries a canonical code, a stable `reason`, the metadata that its text repeats, and,
only if another attempt can help, a retry delay. The text names the field, the rule, the limit and the given value; it
never contains server paths, other tenants' names, prompts or tracebacks.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Self

_GIVEN_CHARACTERS_MAX = 64


class Code(StrEnum):
    """Canonical gRPC code names that this tree uses (google/rpc/code.proto)."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ABORTED = "ABORTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


def shown(value: object) -> str:
    """Return `value` as an error may show it: control characters escaped, at most 64 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: _GIVEN_CHARACTERS_MAX + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= _GIVEN_CHARACTERS_MAX else text[: _GIVEN_CHARACTERS_MAX - 1] + "…"


class WeftError(Exception):
    """Base of the tree.

    reason: UPPER_SNAKE, stable across releases; for programs to compare.
    message: for people.
    field: path of the offending field (`sampling.temperature`), or "" if no single field is at fault.
    metadata: the variable parts of the message (`limit`, `given` …), as strings.
    retry_after_s: set only if the same call can succeed later.
    """

    code = Code.INTERNAL

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, object] = MappingProxyType({}),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = {key: shown(value) for key, value in metadata.items()}
        if field:
            self.metadata.setdefault("field", shown(field))
        assert retry_after_s is None or retry_after_s >= 0, retry_after_s
        self.retry_after_s = retry_after_s

    @classmethod
    def at(cls, reason: str, field: str, text: str, *, retry_after_s: float | None = None, **metadata: object) -> Self:
        """Return an error of one field, with the text "field: text"."""
        return cls(reason, f"{field}: {text}", field=field, metadata=metadata, retry_after_s=retry_after_s)


class InvalidRequest(WeftError):
    """A request field breaks its rule; sending it again cannot help."""

    code = Code.INVALID_ARGUMENT

    @classmethod
    def rule(cls, reason: str, field: str, rule: str, *, given: object, limit: object = None) -> Self:
        """Return an error with the text "field: rule (limit …), given …", the form of all texts of broken rules."""
        metadata = {"given": given} if limit is None else {"limit": limit, "given": given}
        bounds = "" if limit is None else f" (limit {shown(limit)})"
        return cls(reason, f"{field}: {rule}{bounds}, given {shown(given)}", field=field, metadata=metadata)


class InvalidAdapter(InvalidRequest):
    """An adapter's files break a rule; none of them was kept."""


class Unauthenticated(WeftError):
    """The call identifies no caller. Unknown, wrong and expired tokens get the same error."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(WeftError):
    """The caller lacks a role that the call requires."""

    code = Code.PERMISSION_DENIED


class AdapterNotFound(WeftError):
    """No such adapter. Unknown and foreign ids get the same error."""

    code = Code.NOT_FOUND


class AdapterExists(WeftError):
    """The id is taken by other content and `replace` was not set."""

    code = Code.ALREADY_EXISTS


class AdapterConflict(WeftError):
    """Another call changed the adapter first."""

    code = Code.ABORTED


class AdapterUnusable(WeftError):
    """The adapter exists but cannot serve now."""

    code = Code.FAILED_PRECONDITION


class Overloaded(WeftError):
    """A bounded resource is full."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(WeftError):
    """The caller's deadline passed."""

    code = Code.DEADLINE_EXCEEDED


class Cancelled(WeftError):
    """The caller cancelled."""

    code = Code.CANCELLED


class Unavailable(WeftError):
    """This server cannot take the call. Trying again, here or on another replica, is safe."""

    code = Code.UNAVAILABLE


class DataLoss(WeftError):
    """Stored bytes no longer match their digest."""

    code = Code.DATA_LOSS


def draining_error() -> Unavailable:
    """Return the error for calls that arrive during shutdown."""
    return Unavailable("DRAINING", "the server is shutting down", retry_after_s=1.0)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, the last first, since a later error hides its cause."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
