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
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    if error.errno in _FULL:
        return Overloaded("STORE_FULL", f"the adapter store is full ({code})", metadata={"errno": code})
    text, metadata = f"the adapter store cannot be used ({code})", {"errno": code}
    if isinstance(error, StillLocked):
        text, metadata = f"the adapter store {error}", {"limit": error.timeout_s}
    return Unavailable("STORE_UNAVAILABLE", text, metadata=metadata, retry_after_s=_RETRY_AFTER_S)
