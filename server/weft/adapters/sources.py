"""Open sources of local adapters: plain PEFT directories below the store, or below roots that the operator allows.

A source is a path given by a caller. It is walked component by component from an open directory, never through a link.
Each file is opened once: the bytes that are hashed, checked and kept are read from that one descriptor, so nothing can
be exchanged between a check and its use.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from weft import durable
from weft.errors import AdapterUnusable, InvalidAdapter, InvalidRequest
from weft.v1.adapter_files import FOREIGN_FILES, PEFT_FILES, foreign_refused

OWN_DIRECTORIES = frozenset({"catalog", "versions", "staging"})

_FIELD = "source"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?://([^/?#]*))?")  # a single letter is a drive, refused as a path
_SCHEMES_NEVER = frozenset({"file", "http", "ftp", "data"})
_PATH_CHARACTERS_MAX = 1024
_COMPONENT_BYTES_MAX = 255
_WALK = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_UNREADABLE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def source_directory(source: str, root: Path, allowed: Sequence[Path]) -> Iterator[int]:
    """Yield an open descriptor of the directory that `source` names.

    Relative paths start at `root`; absolute ones must lie below one of `allowed`.
    """
    start, components = _resolved(source, root, allowed)
    with contextlib.ExitStack() as opened:
        directory = os.open(start, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, directory)
        for component in components:
            directory = _open(component, directory, _WALK, stat.S_ISDIR, "a directory")
            opened.callback(os.close, directory)
        yield directory


def open_source_file(directory: int, name: str) -> BinaryIO:
    """Open `name` in `directory`, which must be a regular file with a single link."""
    try:
        fd = _open(name, directory, _READ, stat.S_ISREG, "a regular file")
    except InvalidAdapter as error:
        found = [other for other in FOREIGN_FILES if name == PEFT_FILES.weights and holds(directory, other)]
        if error.reason == "SOURCE_NOT_FOUND" and found:
            raise InvalidAdapter.rule("FORMAT_UNSUPPORTED", name, foreign_refused(found[0]), given=found[0]) from None
        raise
    file = os.fdopen(fd, "rb", buffering=0)
    try:
        links = os.fstat(fd).st_nlink
        if links != 1:
            rule = "must not have other hard links"
            raise InvalidAdapter.rule("SOURCE_NOT_REGULAR", name, rule, limit=1, given=links)
    except BaseException:
        file.close()
        raise
    return file


def _resolved(source: str, root: Path, allowed: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return the trusted directory to start from, and the untrusted names to walk from there."""
    _refuse_url(source)
    invalid = partial(InvalidRequest.rule, "SOURCE_INVALID", _FIELD, given=source)
    if not source or len(source) > _PATH_CHARACTERS_MAX or not source.isprintable() or "\\" in source:
        raise invalid("must be a path of printable characters without a backslash", limit=_PATH_CHARACTERS_MAX)
    components = tuple(source.removeprefix("/").removesuffix("/").split("/"))
    for component in components:
        if component in {"", ".", ".."} or len(component.encode()) > _COMPONENT_BYTES_MAX:
            raise invalid("must be a plain path without . or ..")
    if not source.startswith("/"):
        if components[0] in OWN_DIRECTORIES:
            raise invalid("must not be the store's own directory")
        return root, components
    path = PurePosixPath("/", *components)
    for start in allowed:
        if path.is_relative_to(start):
            return start, path.relative_to(start).parts
    raise invalid("must be relative to the store or inside a directory that the operator allows")


def _refuse_url(source: str) -> None:
    """Refuse URLs; nothing is ever fetched. A URL may hold a credential, so errors repeat only its scheme."""
    match = _URL.match(source)
    if not match:
        return
    scheme, authority = match.group(1).lower(), match.group(2) or ""
    if scheme in _SCHEMES_NEVER or "@" in authority:
        raise InvalidRequest.rule(
            "SOURCE_SCHEME", _FIELD, "must not be a URL of this scheme, nor carry a user name", given=scheme
        )
    raise AdapterUnusable.at("SOURCE_DISABLED", _FIELD, "URL sources are disabled on this server", given=scheme)


def _open(name: str, directory: int, flags: int, kind: Callable[[int], bool], wanted: str) -> int:
    """Open `name` if its mode is of `kind`.

    The mode is checked before, because opening a device may have effects, and again once the file is open.
    """
    irregular = InvalidAdapter.rule("SOURCE_NOT_REGULAR", _FIELD, f"must be {wanted} and no link", given=name)
    try:
        if not kind(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise irregular
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in durable.NOT_REGULAR:
            raise irregular from None
        if error.errno in _UNREADABLE:
            raise InvalidAdapter.rule("SOURCE_NOT_FOUND", _FIELD, "must exist and be readable", given=name) from None
        raise
    try:
        if not kind(os.fstat(fd).st_mode):
            raise irregular
    except BaseException:
        os.close(fd)
        raise
    return fd


def holds(directory: int, name: str) -> bool:
    """Return whether an open directory holds anything called `name`."""
    return os.access(name, os.F_OK, dir_fd=directory, follow_symlinks=False)
