"""The user's cache of compiled kernels. What is opened here is loaded as code.

A library is named for everything that it depends on (build.py) and for its own content. The directory is opened first
and its files are reached through its descriptor. A file is loaded through the descriptor whose bytes were compared with
its name, so nothing can be exchanged between check and use. A library that is damaged, or that another user may have
written, is compiled again; if that holds for the directory, the library is compiled for this process alone.
"""

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from weft import durable
from weft.kernels.cpu import build

_log = logging.getLogger(__name__)

_ROOT = 0


class Compiled(NamedTuple):
    """A library for this processor, open for reading.

    The descriptor is never closed: the dynamic loader takes two files for one library if their paths are equal, and a
    closed descriptor's number, which is in the path, would be given to another file.
    """

    descriptor: int
    kept: Path | None  # None if it is not in the cache

    @property
    def path(self) -> Path:
        """Path under which the dynamic loader finds this very file, whatever has its name by now."""
        return _reached(self.descriptor)


def directory() -> Path:
    """Return where compiled kernels live: $XDG_CACHE_HOME/weft/kernels, else ~/.cache/weft/kernels."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError as error:
        reason = "no home directory for the compiled CPU kernels: set XDG_CACHE_HOME"
        raise build.KernelsUnavailable(reason) from error
    return base / "weft" / "kernels"


def native(directory: Path) -> Compiled:
    """Open this processor's library in `directory`, compiling it if none is there to be trusted (up to half a minute).

    Any number of processes may do this at once. Raises KernelsUnavailable if the library cannot be compiled.
    """
    prefix = build.identity()
    compiled, reason = None, "the compiled library was removed"
    try:
        with _opened(directory) as opened:
            kept = _find(opened, directory, prefix)
            if kept is None:
                compiled = _compile()
                _keep(compiled, opened, prefix)
                kept = _find(opened, directory, prefix)
        if kept is not None:
            return kept
    except OSError as error:
        reason = error.strerror
    _log.warning(
        "%s: %s; the CPU kernels are compiled for this process alone, and again at every start; make this directory "
        "your own, or set XDG_CACHE_HOME to another",
        directory,
        reason,
    )
    return _held(compiled or _compile(), None)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[Path]:
    """Yield a path through which `directory` stays the one that was checked. Raises OSError if it is not trusted."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fault = _fault(os.fstat(descriptor))
        if fault:
            raise PermissionError(errno.EPERM, fault)
        yield _reached(descriptor)
    finally:
        os.close(descriptor)


def _find(opened: Path, directory: Path, prefix: str) -> Compiled | None:
    """Open the library of this name whose content is what its name says. Remove those that are not to be trusted."""
    for name in sorted(os.listdir(opened)):
        if not (name.startswith(f"{prefix}-") and name.endswith(".so")):
            continue
        try:
            file = durable.open_regular(opened / name)
        except FileNotFoundError:  # another process has just removed it
            continue
        except OSError as error:
            fault = (
                "is no regular file" if error.errno in durable.NOT_REGULAR else f"cannot be opened ({error.strerror})"
            )
        else:
            fault = _fault(os.fstat(file.fileno())) or ("" if name == _name(prefix, file) else "is damaged")
            if not fault:
                return _held(file, directory / name)
            file.close()
        _log.warning("%s: %s; the CPU kernels are compiled again", directory / name, fault)
        with contextlib.suppress(OSError):
            os.unlink(opened / name)
    return None


def _fault(status: os.stat_result) -> str:
    """Return why another user may have changed what has this status, or "" if none can."""
    if status.st_uid not in (os.geteuid(), _ROOT):
        return f"belongs to user {status.st_uid}, and user {os.geteuid()} would load it as code"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(status.st_mode):o}), and it would be loaded as code"
    return ""


def _compile() -> BufferedReader:
    """Compile the library in a directory that only this process knows, and return it open, with no name left."""
    try:
        with tempfile.TemporaryDirectory(prefix="weft-kernels-") as scratch:
            linked = Path(scratch, "linked.so")
            build.link(linked, build.NATIVE)
            return durable.open_regular(linked)
    except OSError as error:
        raise build.KernelsUnavailable(f"no place to compile the CPU kernels ({error}); set TMPDIR") from error


def _keep(compiled: BufferedReader, opened: Path, prefix: str) -> None:
    """Copy the library into the cache, where its final name is absent or complete."""
    making = opened / f".making-{secrets.token_hex(8)}"
    descriptor = durable.create(making)
    try:
        compiled.seek(0)
        durable.write_all(descriptor, compiled.read())
        durable.sync(descriptor)
        durable.publish(making, opened / _name(prefix, compiled))
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    finally:
        durable.release(descriptor)


def _name(prefix: str, library: BufferedReader) -> str:
    library.seek(0)
    return f"{prefix}-{hashlib.file_digest(library, 'sha256').hexdigest()[:32]}.so"


def _held(file: BufferedReader, kept: Path | None) -> Compiled:
    with file:
        return Compiled(os.dup(file.fileno()), kept)


def _reached(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}")
