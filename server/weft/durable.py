"""The few file operations that survive a crash, for the store and for the user's cache.

A file is created in a directory that no reader uses, written, fsynced, and renamed to its final path; then the
directory that received it is fsynced. Only after this may a call report that something is stored.
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

from weft import failpoints

NOT_REGULAR = frozenset({errno.ELOOP, errno.ENXIO, errno.ENOTDIR})  # errors of opening a link, FIFO or socket

_LOCK_POLL_S = 0.005


class StillLocked(TimeoutError):
    """Another thread or process held a lock for all of `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"stayed locked by another process for {timeout_s} s")
        self.timeout_s = timeout_s


def create(path: Path) -> int:
    """Create a new, empty, owner-only file for writing, never over an existing one and never through a link."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with _undone(fd, path):
        failpoints.hit("after_tmp_open")
    return fd


def create_locked(path: Path) -> int:
    """Create a file that stays locked as long as its descriptor, or a process that has it, lives."""
    fd = create(path)
    with _undone(fd, path):
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


@contextlib.contextmanager
def _undone(fd: int, path: Path) -> Iterator[None]:
    """Remove the new file if the block fails."""
    try:
        yield
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, never through a link. Raises OSError ELOOP for anything that is not a regular file."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, in as many calls as it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
        failpoints.hit("mid_write")


def sync(fd: int) -> None:
    """Wait until the file's bytes are on the disk."""
    failpoints.hit("before_fsync")
    os.fsync(fd)
    failpoints.hit("after_fsync")


def sync_file(path: Path) -> None:
    """Make the content of a file that a library wrote durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


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
    """Remove one of our own directories, in which no other program swaps names for links meanwhile."""
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
    """Exclude every other thread and process that locks `path`. The kernel releases the lock when its holder dies.

    Raises StillLocked if another holder keeps it for all of `timeout_s`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        give_up_at = time.monotonic() + timeout_s
        while not _try_lock(fd):
            if time.monotonic() >= give_up_at:
                raise StillLocked(timeout_s)
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        release(fd)


def release(fd: int) -> None:
    """Close a descriptor whose data no longer matters, ignoring failure."""
    with contextlib.suppress(OSError):
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Return whether any open descriptor, of this process or another, holds a lock on the file `path`."""
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
