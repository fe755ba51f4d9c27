"""The audit log of a server: appended by a thread of its own, so that no call waits for the disk.

Serving goes on if the log cannot be written, or not fast enough: otherwise whoever can fill the disk could stop the
server. No line is lost silently: lost ones are logged and counted in `weft_audit_lines`, and the next line that is
written gives their number in `lost`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import queue
import stat
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import Counter

from weft import durable
from weft.api.access.audit_chain import BEGINNING, Head, opened, sealed, sha256_of
from weft.api.access.secret_file import UnusableAccess

_log = logging.getLogger(__name__)

_KNOB = "audit_log_file"
_QUEUE_MAX = 4096
_TAIL_BYTES = 1 << 20  # of the file, read to find the end of its chain; a line has less than 4 KiB
_FIRST = b'{"seq":1,'
_END_TIMEOUT_S = 10.0

Facts = Mapping[str, object]


class AuditLog:
    """A file to which facts are appended as lines of a chain.

    lines: the counter of lines by outcome. Raises UnusableAccess if the file cannot be appended to, is not an audit
    log, or is that of another server that runs.
    """

    def __init__(self, path: Path, lines: Counter, *, queue_max: int = _QUEUE_MAX) -> None:
        self._path, self._lines = path, lines
        self._queue: queue.Queue[Facts | None] = queue.Queue(queue_max)
        self._lost = 0  # since the last line that was written; guarded by the lock, as several threads record
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._head = BEGINNING
        self._has_ended = False
        try:
            self._open()
        except OSError as error:
            text = os.strerror(error.errno or errno.EIO)
            raise UnusableAccess(f"{_KNOB}: {path} cannot be appended to: {text}") from None
        self._thread = threading.Thread(target=self._write_queued, name="weft-audit", daemon=True)

    def start(self) -> None:
        """Start the thread that writes."""
        self._thread.start()

    def record(self, event: str, **facts: object) -> None:
        """Append a line soon; called by any thread. If the queue is full, the line is lost."""
        try:
            self._queue.put_nowait({"time": datetime.now(UTC).isoformat(), "event": event, **facts})
        except queue.Full:
            self._lose("the disk is too slow")

    def close(self) -> None:
        """Write what is queued, and close the file. If the disk hangs, give up after some seconds."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_END_TIMEOUT_S)
            self._thread.join(_END_TIMEOUT_S)
        if not self._thread.is_alive():
            self._close()

    def _write_queued(self) -> None:
        while batch := self._queued():
            with self._lock:
                lost = self._lost
            if lost:
                batch[0] = {**batch[0], "lost": lost}
            try:
                if self._fd is None:
                    self._open()
                self._append(batch)
            except (OSError, UnusableAccess) as error:
                self._close()
                self._lose(str(error), len(batch))
            else:
                with self._lock:
                    self._lost -= lost

    def _queued(self) -> list[Facts]:
        """Wait for facts and return all that are queued, so that one wait for the disk is enough; none at the end."""
        batch: list[Facts] = []
        facts = None if self._has_ended else self._queue.get()
        while facts is not None:
            batch.append(facts)
            try:
                facts = self._queue.get_nowait()
            except queue.Empty:
                return batch
        self._has_ended = True
        return batch

    def _lose(self, why: str, num_lines: int = 1) -> None:
        with self._lock:
            is_first = self._lost == 0
            self._lost += num_lines
        self._lines.labels("lost").inc(num_lines)
        if is_first:
            _log.error("%s: lines are being lost: %s", _KNOB, why)

    def _append(self, batch: list[Facts]) -> None:
        """Append a line for each; after a failure, some of them may be in the file."""
        assert self._fd is not None
        head, lines = self._head, []
        for facts in batch:
            head, line = sealed(head, facts)
            lines.append(line)
        durable.write_all(self._fd, b"".join(lines))
        os.fsync(self._fd)
        self._head = head
        self._lines.labels("written").inc(len(lines))

    def _open(self) -> None:
        """Open the file, find the end of its chain, and repair it if a line was left unfinished."""
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnusableAccess(f"{_KNOB}: {self._path} must be a regular file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnusableAccess(f"{_KNOB}: {self._path} is that of another server that runs") from None
            self._head, torn, is_unfinished = self._end_of(fd)
            self._fd = fd
            if torn or is_unfinished:
                _log.warning("%s: the last line was left unfinished; a line about this follows it", _KNOB)
                durable.write_all(fd, b"\n" if is_unfinished else b"")
                self._append([{"time": datetime.now(UTC).isoformat(), "event": "repair", "torn": torn}])
        except BaseException:
            self._fd = None
            os.close(fd)
            raise

    def _end_of(self, fd: int) -> tuple[Head, list[str], bool]:
        """Return the end of the chain, the sha256 of the torn lines after it, and whether a line break is missing."""
        size = os.fstat(fd).st_size
        start = max(0, size - _TAIL_BYTES)
        lines = os.pread(fd, _TAIL_BYTES, start).split(b"\n")
        is_unfinished = lines[-1] != b""
        if not is_unfinished:
            lines.pop()
        torn: list[str] = []
        for line in reversed(lines):
            if (content := opened(line)) is not None:
                return Head(content["seq"], content["digest"]), torn[::-1], is_unfinished
            torn.append(sha256_of(line))
        if start or (lines and not _FIRST.startswith(lines[0][: len(_FIRST)])):
            raise UnusableAccess(
                f"{_KNOB}: {self._path} does not end as an audit log; give another file, or move it away"
            )
        return BEGINNING, torn[::-1], is_unfinished

    def _close(self) -> None:
        if self._fd is not None:
            durable.release(self._fd)
            self._fd = None
