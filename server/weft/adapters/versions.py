"""The content of an adapter: how a digest is computed, staged and read back.

    digest = sha256( "weft generation 1\\n" | u64 n | for each of the n files, by name:
                         u64 length of name | name | u64 size | sha256 of its bytes )       u64 is big-endian

The files count byte for byte: a config with the same meaning in another spelling is another digest. So the digest
is free of any opinion about JSON, and can be reproduced with nothing but sha256.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from weft import durable
from weft.adapters.identifiers import AdapterDigest, abbreviated
from weft.adapters.storage import storage_errors
from weft.config import AdapterLimits
from weft.errors import DataLoss, InvalidAdapter
from weft.v1.adapter_files import CONFIG_FILES, PAIRS

_COPY_BYTES = 1 << 20
_DOMAIN = b"weft generation 1\n"  # a digest was called a generation; another word would give other digests
_FILE_NAME = re.compile(r"[a-z0-9_]{1,48}\.[a-z0-9]{1,15}")


class FileDigest(NamedTuple):
    """One file of a version; `sha256` is hex."""

    name: str
    size_bytes: int
    sha256: str


def digest_of(files: Iterable[FileDigest]) -> AdapterDigest:
    """Return the digest of the files together. Every part is framed by its length, so no two sets of files collide."""
    ordered = sorted(files)
    digest = hashlib.sha256(_DOMAIN + _u64(len(ordered)))
    for file in ordered:
        name = file.name.encode()
        digest.update(_u64(len(name)) + name + _u64(file.size_bytes) + bytes.fromhex(file.sha256))
    return AdapterDigest(digest.hexdigest())


def digest_at(directory: Path) -> AdapterDigest:
    """Return the digest that registering a directory yields. Raises FileNotFoundError if it holds no pair of files."""
    files = []
    for name in next((pair for pair in PAIRS if (directory / pair.config).is_file()), PAIRS[0]):
        with (directory / name).open("rb") as file:
            files.append(_hashed(name, file))
    return digest_of(files)


def _hashed(name: str, file: BufferedReader) -> FileDigest:
    """Read a file to its end."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(name, file.tell(), digest)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


class StagedFile:
    """An incoming file: written in order, hashed as it is written, durable when `close` returns."""

    def __init__(self, path: Path, size_max: int) -> None:
        with storage_errors():
            self._fd = durable.create(path)
        self.name = path.name
        self._size_max = size_max
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.is_complete = False

    @property
    def digest(self) -> FileDigest:
        """Digest of the bytes written so far."""
        return FileDigest(self.name, self.size_bytes, self._sha256.hexdigest())

    def write(self, chunk: bytes) -> None:
        self.require_room(len(chunk))
        with storage_errors():
            durable.write_all(self._fd, chunk)
        self._sha256.update(chunk)
        self.size_bytes += len(chunk)

    def require_room(self, num_bytes: int) -> None:
        """Raise InvalidAdapter if `num_bytes` more would not fit, before they are read or sent."""
        size_bytes = self.size_bytes + num_bytes
        if size_bytes > self._size_max:
            reason = "CONFIG_INVALID" if self.name in CONFIG_FILES else "ADAPTER_TOO_LARGE"
            raise InvalidAdapter.rule(reason, self.name, "has too many bytes", limit=self._size_max, given=size_bytes)

    def close(self) -> None:
        with storage_errors():
            durable.sync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
        self.is_complete = True

    def abandon(self) -> None:
        """Close the file unfinished; it is removed with its staging directory."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            durable.release(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class StagedVersion(NamedTuple):
    """Complete, durable files that no other call can see yet."""

    digest: AdapterDigest
    files: tuple[FileDigest, ...]
    directory: Path

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def open(self, name: str) -> BufferedReader:
        """Open a file for the checks between staging and commit; no other code writes here."""
        with storage_errors():
            return durable.open_regular(self.directory / name)


class Staging(contextlib.ExitStack):
    """A private directory for incoming files. `close`, or the end of the `with` block, removes what is left of it.

    Recovery removes what cannot be removed now.
    """

    def __init__(self, directory: Path, owner_path: Path, owner_fd: int, limits: AdapterLimits) -> None:
        super().__init__()
        self.directory = directory
        self._limits = limits
        self._files: list[StagedFile] = []
        self.callback(durable.release, owner_fd)  # its lock shows other processes' recovery that the directory is alive
        self.callback(_remove, os.unlink, owner_path)
        self.callback(_remove, durable.remove_tree, directory)

    def open_file(self, name: str, size_max: int | None = None) -> StagedFile:
        """Create a file of at most `size_max` bytes, or at most the limit of its kind if that is lower."""
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"a version has no file named {name!r}")
        limit = self._limits.config_bytes_max if name in CONFIG_FILES else self._limits.file_bytes_max
        file = StagedFile(self.directory / name, limit if size_max is None else min(size_max, limit))
        self._files.append(file)
        self.callback(file.abandon)
        return file

    def seal(self) -> StagedVersion:
        """Make the set of files durable and name it. Every file must already be closed."""
        if not self._files or not all(file.is_complete for file in self._files):
            raise ValueError("a version is sealed once all of its files are closed")
        with storage_errors():
            durable.sync_directory(self.directory)
        files = tuple(sorted(file.digest for file in self._files))
        return StagedVersion(digest_of(files), files, self.directory)


def _remove(remove: Callable[[Path], None], path: Path) -> None:
    with contextlib.suppress(OSError):
        remove(path)


class StoredVersion(contextlib.ExitStack):
    """An open stored version: `files` by name, each at its first byte. No process collects it while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, BufferedReader] = {}

    @property
    def size_bytes(self) -> int:
        return sum(os.fstat(file.fileno()).st_size for file in self.files.values())


def open_stored(directory: Path, digest: AdapterDigest) -> StoredVersion:
    """Open every file in `directory`, and hash them again through the descriptors that are read later.

    Raises FileNotFoundError if there is no such directory, DataLoss BLOB_CORRUPT if it holds anything but files, or
    none, or if any has changed.
    """
    version = StoredVersion()
    try:
        for name in sorted(os.listdir(directory)):
            version.files[name] = version.enter_context(durable.open_regular(directory / name))
            fcntl.flock(version.files[name], fcntl.LOCK_SH)
        found = [_hashed(name, file) for name, file in version.files.items()]
        if not found:
            raise corrupt(digest, "its files are gone")
        if digest_of(found) != digest:
            raise corrupt(digest, "its files no longer have its digest")
        for file in version.files.values():
            file.seek(0)
    except BaseException as error:
        version.close()
        if isinstance(error, OSError) and error.errno in durable.NOT_REGULAR:
            raise corrupt(digest, "it holds something other than its files") from None
        raise
    return version


def corrupt(digest: AdapterDigest, what: str) -> DataLoss:
    """Return the error for files that do not match their digest."""
    return DataLoss("BLOB_CORRUPT", f"digest {abbreviated(digest)}: {what}", metadata={"digest": digest})


def is_open(directory: Path) -> bool:
    """Return whether any process has a file of this version open."""
    return any(durable.is_locked(directory / name) for name in os.listdir(directory))


def copy_file(source: BinaryIO, target: StagedFile) -> None:
    """Copy from an open file, which must not change meanwhile. Raises InvalidAdapter CHECKSUM_MISMATCH if it does."""
    before = os.fstat(source.fileno())
    target.require_room(before.st_size)
    while chunk := source.read(_COPY_BYTES):
        target.write(chunk)
    after = os.fstat(source.fileno())
    is_touched = (before.st_mtime_ns, before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns)
    if is_touched or target.size_bytes != before.st_size:
        sizes = {"limit": before.st_size, "given": target.size_bytes}
        raise InvalidAdapter.rule("CHECKSUM_MISMATCH", target.name, "changed while it was copied", **sizes)
