"""The few file operations that survive a crash, and what their failures are called.

A file is created in a directory nobody reads, written, fsynced, renamed to where it is read, and the directory that
received it is fsynced. After that order, and not before, a caller may be told that something is stored.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from weft.adapters import failpoints
from weft.errors import Overloaded, Unavailable, WeftError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOCK_POLL_S = 0.005
_RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn an OSError of the store's own files into Overloaded STORE_FULL or Unavailable STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise _named(error) from error


def _named(error: OSError) -> WeftError:
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    if error.errno in _FULL:
        return Overloaded("STORE_FULL", f"the adapter store is full ({code})", metadata={"errno": code})
    return Unavailable(
        "STORE_UNAVAILABLE",
        f"the adapter store cannot be used ({code})",
        metadata={"errno": code},
        retry_after_s=_RETRY_AFTER_S,
    )


def create(path: Path) -> int:
    """A new, empty, owner-only file for writing; never an existing one and never through a link."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    failpoints.hit("after_tmp_open")
    return fd


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
        failpoints.hit("mid_write")


def sync(fd: int) -> None:
    failpoints.hit("before_fsync")
    os.fsync(fd)
    failpoints.hit("after_fsync")


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable: creations, renames and removals."""
    failpoints.hit("before_dirsync")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(source: Path, target: Path) -> None:
    """Rename `source`, whose content is already fsynced, to `target`, atomically and durably."""
    failpoints.hit("before_rename")
    os.rename(source, target)
    failpoints.hit("after_rename")
    sync_directory(target.parent)


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Exclude every other thread and process that locks `path`. The kernel lets go of it when a holder dies."""
    give_up_at = time.monotonic() + timeout_s
    while (fd := try_lock(path)) is None:
        if time.monotonic() >= give_up_at:
            raise Unavailable(
                "STORE_UNAVAILABLE",
                "another process holds the adapter store's lock",
                metadata={"limit": timeout_s},
                retry_after_s=_RETRY_AFTER_S,
            )
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """The descriptor whose life is the lock's, or None while someone else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Whether any open descriptor, of this process or another, holds a lock on the file `path`."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
