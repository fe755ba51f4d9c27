"""The few file operations that survive a crash, and what their failures are called.

A file is created in a directory nobody reads, written, fsynced, renamed to where it is read, and the directory that
received it is fsynced. After that order, and not before, a caller may be told that something is stored.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from weft.adapters import failpoints
from weft.errors import Overloaded, Unavailable, WeftError

NOT_REGULAR = frozenset({errno.ELOOP, errno.ENXIO, errno.ENOTDIR})  # what opening a link, FIFO or socket answers

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOCK_POLL_S = 0.005
_RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn an OSError of the store's own files into Overloaded STORE_FULL or Unavailable STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise named(error) from error


def named(error: OSError) -> WeftError:
    """The error of ours for `error`. It names the cause and, unlike the OSError, no path."""
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
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with _undone(fd, path):
        failpoints.hit("after_tmp_open")
    return fd


def create_locked(path: Path) -> int:
    """A new file that is locked as long as its descriptor, or a process that has it, lives."""
    fd = create(path)
    with _undone(fd, path):
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


@contextlib.contextmanager
def _undone(fd: int, path: Path) -> Iterator[None]:
    """Take the new file away again if the block fails."""
    try:
        yield
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def open_regular(path: Path) -> BufferedReader:
    """For reading; never through a link, and OSError ELOOP for anything that is not a file."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


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


def remove_tree(path: Path) -> None:
    """Remove a directory of the store's own, where nobody exchanges names for links meanwhile."""
    with os.scandir(path) as entries:
        children = list(entries)
    for child in children:
        if child.is_dir(follow_symlinks=False):
            remove_tree(Path(child.path))
        else:
            os.unlink(child.path)
    os.rmdir(path)


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Exclude every other thread and process that locks `path`. The kernel lets go of it when a holder dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        give_up_at = time.monotonic() + timeout_s
        while not _try_lock(fd):
            if time.monotonic() >= give_up_at:
                raise Unavailable(
                    "STORE_UNAVAILABLE",
                    f"the adapter store stayed locked by another process for {timeout_s} s",
                    metadata={"limit": timeout_s},
                    retry_after_s=_RETRY_AFTER_S,
                )
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        release(fd)


def release(fd: int) -> None:
    """Close a descriptor whose data nobody counts on, so that there is no failure worth telling."""
    with contextlib.suppress(OSError):
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether any open descriptor, of this process or another, holds a lock on the file `path`."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return not _try_lock(fd)
    finally:
        release(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
