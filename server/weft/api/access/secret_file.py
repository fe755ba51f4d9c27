"""Files that hold secrets, or decide who has access: used only if no other user of the machine can change them."""

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

_BYTES_MAX = 4 << 20
_NOT_OURS = 0o077
_NOT_THE_GROUPS_OF_ROOT = 0o037


class UnusableAccess(ValueError):
    """Settings or files of access with which a server must not start; `hint` has the commands that mend them, or ""."""

    def __init__(self, text: str, *, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class Stamp(NamedTuple):
    """What changes when a file is replaced or written; compared instead of contents."""

    device: int
    inode: int
    size: int
    modified_ns: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, following links, or None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def read(path: Path, knob: str, *, is_secret: bool = True) -> bytes:
    """Return the content of a file of at most 4 MiB that a setting names.

    With `is_secret`, it must belong to this process' user or to root, and its group and others must have no permission.
    One of root may be readable by its group, since Kubernetes gives secrets to a process without rights in this way.
    Links are followed: the mode of the file counts.
    Raises UnusableAccess, which names the setting, the fault and the remedy.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnusableAccess(f"{knob}: {path} must be a regular file")
            if is_secret:
                _require_private(found, path, knob)
            content = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise UnusableAccess(f"{knob}: {path} cannot be read: {os.strerror(error.errno or errno.EIO)}") from None
    if len(content) > _BYTES_MAX:
        raise UnusableAccess(f"{knob}: {path} must have at most {_BYTES_MAX} bytes, given {found.st_size}")
    return content


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO must not wait for a writer


def _require_private(found: os.stat_result, path: Path, knob: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        rule = "must belong to the user of the server, or to root"
        raise UnusableAccess(f"{knob}: {path} {rule}, given user {found.st_uid}; run chown {os.geteuid()} {path}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & (_NOT_THE_GROUPS_OF_ROOT if found.st_uid == 0 else _NOT_OURS):
        rule = "must be a file that only its owner can read and write"
        raise UnusableAccess(f"{knob}: {path} {rule}, given mode {mode:04o}; run chmod 600 {path}")
