"""Turn failures of the store's own files into Weft's errors."""

import contextlib
import errno
from collections.abc import Iterator

from weft.durable import StillLocked
from weft.errors import Overloaded, Unavailable, WeftError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn an OSError of the store's own files into Overloaded STORE_FULL or Unavailable STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise named(error) from error


def named(error: OSError) -> WeftError:
    """Return Weft's error for `error`. It names the cause and, unlike the OSError, no path."""
    if isinstance(error, StillLocked):
        return Unavailable(
            "STORE_UNAVAILABLE",
            f"the adapter store {error}",
            metadata={"limit": error.timeout_s},
            retry_after_s=_RETRY_AFTER_S,
        )
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    if error.errno in _FULL:
        return Overloaded("STORE_FULL", f"the adapter store is full ({code})", metadata={"errno": code})
    return Unavailable(
        "STORE_UNAVAILABLE",
        f"the adapter store cannot be used ({code})",
        metadata={"errno": code},
        retry_after_s=_RETRY_AFTER_S,
    )
