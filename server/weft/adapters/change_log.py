"""The log of changed adapter ids, by which other threads and processes follow a catalog without reading all of it.

    weft changes <32 hex digits>     the first line; another token is another log
    +<adapter_id>                    a change of this id begins
    =<adapter_id>                    it has ended, whether or not it took place

It is written under the store's lock, so at most one change is ever open: the last one. A process that dies within a
change leaves it open, and the next change shows that it is over. The log is a hint, not a record: it need not survive a
power loss, and a reader that finds another log than before reads the whole catalog.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from weft import durable, failpoints
from weft.adapters.identifiers import AdapterId, check_inner_id
from weft.errors import InvalidRequest

_HEAD = b"weft changes "
_HEAD_BYTES = len(_HEAD) + 32 + 1
_BYTES_MAX = 1 << 20


class Position(NamedTuple):
    """How far a reader has read. token: of the log; b"" if there was none. open_id: the id of an open change, or ""."""

    token: bytes = b""
    offset: int = 0
    open_id: str = ""


class News(NamedTuple):
    """Lines that a reader had not read. ids: those to look at again, or None if it must look at all."""

    ids: frozenset[AdapterId] | None
    position: Position


class ChangeLog:
    """The log of one catalog. `change` is called under the store's lock; `read` needs none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def change(self, adapter_id: AdapterId) -> Iterator[None]:
        """Log that an id changes inside the block.

        If the log cannot be written, as on a full disk, it is removed, which makes every reader read the catalog.
        """
        try:
            self._append(f"+{adapter_id}\n", may_begin=True)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        failpoints.hit("after_change_begun")
        try:
            yield
        finally:
            failpoints.hit("before_change_ended")
            with contextlib.suppress(OSError):
                self._append(f"={adapter_id}\n", may_begin=False)

    def read(self, position: Position) -> News:
        """Return what was logged after `position`. Raises OSError if the log is there and cannot be read."""
        try:
            with durable.open_regular(self._path) as file:
                token = file.read(_HEAD_BYTES)
                if token != position.token:
                    return News(None, Position(token, *_last(token + file.read())))
                file.seek(position.offset)
                return _news(file.read(), position)
        except FileNotFoundError:
            return News(frozenset() if position.token == b"" else None, Position())

    def _append(self, line: str, *, may_begin: bool) -> None:
        """Append a line. may_begin: whether a new log may be begun, if there is none or it has become long."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileNotFoundError):
            if not may_begin or os.lstat(self._path).st_size < _BYTES_MAX:
                _write(os.open(self._path, flags), line.encode())
                return
            os.unlink(self._path)
        if may_begin:
            head = _HEAD + secrets.token_hex(16).encode() + b"\n"
            _write(os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600), head + line.encode())


def _write(fd: int, data: bytes) -> None:
    """Write in one call, so that a reader sees all or nothing, and close."""
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def _news(data: bytes, position: Position) -> News:
    """Return the ids in `data`, which was logged after `position`. Lines that make no sense are about any id."""
    offset, open_id = _last(data)
    complete = data[:offset].split(b"\n")[:-1]
    ids = {AdapterId(position.open_id)} if position.open_id else set[AdapterId]()
    for line in complete:
        adapter_id = _id_in(line)
        if adapter_id is None:
            return News(None, position._replace(offset=position.offset + offset, open_id=open_id))
        ids.add(adapter_id)
    still_open = open_id if complete else position.open_id
    return News(frozenset(ids), position._replace(offset=position.offset + offset, open_id=still_open))


def _last(data: bytes) -> tuple[int, str]:
    """Return the number of bytes in complete lines, and the id of a change that is open after them, or ""."""
    offset = data.rfind(b"\n") + 1
    line = data[:offset].rstrip(b"\n").rpartition(b"\n")[2]
    return offset, (_id_in(line) or "") if line.startswith(b"+") else ""


def _id_in(line: bytes) -> AdapterId | None:
    try:
        return check_inner_id(line[1:].decode()) if line[:1] in (b"+", b"=") else None
    except (UnicodeDecodeError, InvalidRequest):
        return None
