"""The durable adapter store: a catalog of small manifests over immutable, content-addressed versions.

    catalog/<adapter_id>.json     the manifest: which digest the id is bound to
    catalog/.changes              the log of changed ids, for other processes
    versions/<digest>/            the files of a digest, never changed
    staging/                      work in progress, worthless after a crash

An acknowledged change survives kill -9 and power loss; any other leaves the old state. Reading takes no lock. Every
change runs under one lock that the kernel releases when its holder dies, so several processes may share a directory,
and each follows the changes of the others (`AdapterStore.index`). A manifest changes only if it still says what the
caller believed. The format is documented in adapters_store/README.md.
Everything here blocks on the disk: call it from a worker thread.
"""

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from weft import durable, failpoints
from weft.adapters.catalog import (
    LOCK_FILE,
    LOG_FILE,
    Catalog,
    Manifest,
    Problem,
    decode,
    find_manifest,
    manifest_path,
)
from weft.adapters.catalog_index import CatalogIndex
from weft.adapters.change_log import ChangeLog
from weft.adapters.identifiers import AdapterDigest, AdapterId, abbreviated, check_digest, is_digest
from weft.adapters.leftovers import Leftovers
from weft.adapters.registry import not_found, require_expected, taken
from weft.adapters.sources import holds, open_source_file, source_directory
from weft.adapters.storage import named, storage_errors
from weft.adapters.versions import StagedVersion, Staging, StoredVersion, copy_file, corrupt, open_stored
from weft.config import AdapterLimits
from weft.errors import AdapterNotFound, DataLoss, Overloaded, Unavailable, shown
from weft.v1.adapter_files import MIXTURE_FILES, PEFT_FILES


class Recovery(NamedTuple):
    """Findings of a start. An id is in `manifests` or in a problem, never in both."""

    manifests: dict[AdapterId, Manifest]
    problems: tuple[Problem, ...]
    num_orphans_removed: int


class AdapterStore:
    """One directory of adapters, which threads and processes may share freely.

    index: the catalog as this process knows it. After every change of its own it has that change.
    """

    def __init__(
        self, root: Path, limits: AdapterLimits, *, allowed_sources: Sequence[Path] = (), lock_timeout_s: float = 30.0
    ) -> None:
        self._root = Path(os.path.abspath(root))
        self._catalog = self._root / "catalog"
        self._versions = self._root / "versions"
        self._staging = self._root / "staging"
        self._limits = limits
        self._allowed_sources = tuple(Path(os.path.abspath(source)) for source in allowed_sources)
        self._lock_timeout_s = lock_timeout_s
        self._log = ChangeLog(self._catalog / LOG_FILE)
        self.index = CatalogIndex(self._catalog, self._log)
        self._leftovers = Leftovers(self._staging, self._versions, self.index)

    # Reading

    def recover(self) -> Recovery:
        """Make the directories, remove what crashes left, and read the catalog. Call this before anything else.

        A bad entry becomes a problem, never a failure. A store that cannot be written is still read.
        """
        problems: list[Problem] = []
        num_orphans = 0
        with storage_errors():
            for directory in (self._catalog, self._versions, self._staging):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with self._changing():
                num_orphans += self._leftovers.sweep_staging(problems)
                self.index.refresh()
                versions = [AdapterDigest(name) for name in os.listdir(self._versions) if is_digest(name)]
                num_orphans += len(self._leftovers.sweep_versions(versions, problems))
        except (Overloaded, Unavailable) as error:
            problems.append(Problem("", None, error.reason, error.message))
        with storage_errors():
            unknown = [name for name in sorted(os.listdir(self._versions)) if not is_digest(name)]
        for name in unknown:
            problems.append(Problem(f"versions/{name}", None, "UNKNOWN_FILE", f"{shown(name)}: is no version"))
        manifests, unreadable = self.read_catalog()
        problems.extend(unreadable)
        for manifest in manifests.values():
            fault = self._fault_of(manifest)
            if fault:
                path = f"versions/{manifest.digest}"
                problems.append(Problem(path, manifest.adapter_id, "BLOB_CORRUPT", fault))
        bad = {problem.adapter_id for problem in problems}
        healthy = {adapter_id: manifest for adapter_id, manifest in manifests.items() if adapter_id not in bad}
        return Recovery(healthy, tuple(problems), num_orphans)

    def read_catalog(self) -> Catalog:
        """Return every manifest as it is now, with other processes' changes. An id in a problem is not a removed id."""
        self.index.refresh()
        return self.index.catalog()

    def read_manifest(self, adapter_id: AdapterId) -> Manifest:
        """Return an id's manifest. Raises AdapterNotFound, or DataLoss MANIFEST_CORRUPT if it cannot be trusted."""
        manifest = find_manifest(self._catalog, adapter_id)
        if manifest is None:
            raise not_found(adapter_id)
        return manifest

    def open_version(self, digest: AdapterDigest) -> StoredVersion:
        """Return the files of a digest, hashed again.

        Raises DataLoss BLOB_CORRUPT if they have changed, or are gone while a manifest names them; AdapterNotFound if
        the store has no such digest, which also results from losing a race against replace and collect.
        """
        with storage_errors(), contextlib.suppress(FileNotFoundError):
            return open_stored(self._version_path(digest), digest)
        if any(manifest.digest == digest for manifest in self.read_catalog().manifests.values()):
            raise corrupt(digest, "its files are gone")
        raise AdapterNotFound("ADAPTER_NOT_FOUND", f"digest {abbreviated(digest)}: no such digest")

    # Staging

    def stage(self) -> Staging:
        """Return a private upload directory: `with store.stage() as staging`, then `open_file`, `seal`, `commit`."""
        token = secrets.token_hex(16)
        owner_path = self._staging / f"{token}.lock"
        with self._changing():  # so that no recovery sees the directory before its owner's lock
            owner_fd = durable.create_locked(owner_path)
            staging = Staging(self._staging / token, owner_path, owner_fd, self._limits)
            try:
                staging.directory.mkdir(mode=0o700)
                failpoints.hit("after_stage_mkdir")
            except BaseException:
                staging.close()
                raise
        return staging

    def stage_copy(self, source: str) -> Staging:
        """Return a staging that holds a copy of the directory `source`, PEFT's or a mixture's.

        Nothing but the two files is read; if both kinds are there, those of the mixture.
        """
        with contextlib.ExitStack() as undo:
            staging = undo.enter_context(self.stage())
            with storage_errors(), source_directory(source, self._root, self._allowed_sources) as directory:
                is_mixture = holds(directory, MIXTURE_FILES.config)
                for name in MIXTURE_FILES if is_mixture else PEFT_FILES:
                    with open_source_file(directory, name) as file, staging.open_file(name) as target:
                        copy_file(file, target)
            undo.pop_all()
        return staging

    # Changing

    def commit(
        self,
        staged: StagedVersion,
        *,
        adapter_id: AdapterId,
        method: str,
        pinned: bool = False,
        source: str = "",
        info: str = "",
        checked_for: str = "",
        replace: bool = False,
        expected_digest: AdapterDigest | None = None,
    ) -> Manifest:
        """Bind `adapter_id` to the staged content; when this returns, the binding is durable.

        The id may be free, or already bound to the same content; with `replace`, bound to other content; with
        `expected_digest`, bound to exactly that. Otherwise raises AdapterExists or AdapterConflict. Content that
        the store already has is kept once, and repaired if it has rotted. A quarantine of other content ends, one of
        the same content stays. After Overloaded or Unavailable the old
        binding stands, unless it was the last step that failed, making the new one durable: then either may be found.
        """
        manifest = Manifest(
            adapter_id=adapter_id,
            digest=staged.digest,
            size_bytes=staged.size_bytes,
            method=method,
            pinned=pinned,
            create_time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            source=source,
            info=info,
            checked_for=checked_for,
        )
        with self._changing():
            failpoints.hit("before_version")
            replaces = replace or expected_digest is not None
            current = self._current(adapter_id, or_corrupt=replace and expected_digest is None)
            require_expected(adapter_id, "" if current is None else current.digest, expected_digest)
            if current is not None and not replaces and current.digest != staged.digest:
                raise taken(adapter_id, current.digest)
            with self._changed(adapter_id), self._placed(staged):
                if current is not None and current.digest == staged.digest:
                    if not replaces:
                        return current
                    manifest = dataclasses.replace(manifest, quarantined=current.quarantined)
                failpoints.hit("before_manifest")
                self._replace_manifest(manifest)
            failpoints.hit("after_manifest_before_ack")
        return manifest

    @contextlib.contextmanager
    def _placed(self, staged: StagedVersion) -> Iterator[None]:
        """Make `versions/` hold the staged content, whole and durable; if the block fails, new files go again."""
        target = self._version_path(staged.digest)
        is_new = not os.path.lexists(target)
        try:
            try:
                open_stored(target, staged.digest).close()
            except (FileNotFoundError, DataLoss) as error:
                if isinstance(error, DataLoss):
                    self._leftovers.take_away(target)
                durable.publish(staged.directory, target)
            else:
                durable.sync_directory(self._versions)
            yield
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError, Unavailable):
                    self.index.refresh()
                    self._leftovers.sweep_versions([staged.digest], [])
            raise

    def set_pinned(self, adapter_id: AdapterId, pinned: bool) -> Manifest:
        """Change `pinned` alone. Raises AdapterNotFound if there is no such id."""
        return self._set(adapter_id, None, pinned=pinned)

    def set_quarantined(self, adapter_id: AdapterId, digest: AdapterDigest, reason: str) -> Manifest:
        """Take content out of service under one id, also after a restart; "" as the reason ends that.

        Nothing changes if the id has another digest by now. Raises AdapterNotFound if there is no such id.
        """
        return self._set(adapter_id, digest, quarantined=reason)

    def set_described(self, adapter_id: AdapterId, digest: AdapterDigest, info: str, checked_for: str) -> Manifest:
        """Keep a new description of an id's content, under the same conditions as `set_quarantined`."""
        return self._set(adapter_id, digest, info=info, checked_for=checked_for)

    def _set(self, adapter_id: AdapterId, digest: AdapterDigest | None, **fields: Any) -> Manifest:
        with self._changing():
            current = self.read_manifest(adapter_id)
            changed = dataclasses.replace(current, **fields)
            if digest not in (None, current.digest) or changed == current:
                return current
            with self._changed(adapter_id):
                self._replace_manifest(changed)
        return changed

    def remove(self, adapter_id: AdapterId, *, expected_digest: AdapterDigest | None = None) -> None:
        """Unbind the id durably; its version stays until it is collected. A corrupt manifest can be removed too."""
        with self._changing():
            if expected_digest is not None:
                require_expected(adapter_id, self.read_manifest(adapter_id).digest, expected_digest)
            with self._changed(adapter_id):
                failpoints.hit("before_remove")
                try:
                    os.unlink(manifest_path(self._catalog, adapter_id))
                except FileNotFoundError:
                    raise not_found(adapter_id) from None
                failpoints.hit("after_remove")
                durable.sync_directory(self._catalog)

    def collect(self, *digests: AdapterDigest) -> tuple[AdapterDigest, ...]:
        """Delete those of these versions that no manifest names and no process has open, and return them.

        Versions that were open in an earlier call are tried again. The cost does not grow with the number of ids.
        Nothing is deleted while a manifest is unreadable, since it may name any of them.
        """
        problems: list[Problem] = []
        with self._changing():
            self.index.refresh()
            removed = self._leftovers.sweep_versions({*digests, *self._leftovers.uncollected}, problems)
        if problems:
            raise Unavailable(problems[0].reason, problems[0].message)
        return removed

    # Internal; methods that change anything are called under the lock

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with storage_errors(), durable.locked(self._catalog / LOCK_FILE, timeout_s=self._lock_timeout_s):
            yield

    @contextlib.contextmanager
    def _changed(self, adapter_id: AdapterId) -> Iterator[None]:
        """Let this and other processes see what happens to an id's manifest inside the block, also if it fails."""
        with self._log.change(adapter_id):
            try:
                yield
            finally:
                self.index.look_at(adapter_id)

    def _version_path(self, digest: AdapterDigest) -> Path:
        """Return the path of a digest; no other code makes one."""
        return self._versions / check_digest(digest)

    def _current(self, adapter_id: AdapterId, *, or_corrupt: bool) -> Manifest | None:
        """Return the manifest that a commit finds. An unconditional replacement also replaces an unreadable one."""
        try:
            return find_manifest(self._catalog, adapter_id)
        except DataLoss:
            if or_corrupt:
                return None
            raise

    def _fault_of(self, manifest: Manifest) -> str:
        """Return the fault that shows in the files' presence and size, without reading them; "" if there is none."""
        try:
            with os.scandir(self._version_path(manifest.digest)) as entries:
                size_bytes = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        except OSError as error:
            return f"digest {abbreviated(manifest.digest)}: {named(error).message}"
        if size_bytes == manifest.size_bytes:
            return ""
        return f"digest {abbreviated(manifest.digest)}: has {size_bytes} bytes instead of {manifest.size_bytes}"

    def _replace_manifest(self, manifest: Manifest) -> None:
        data = manifest.encode()
        decode(data, manifest.adapter_id)  # never write what could not be read back
        temporary = self._staging / f"{secrets.token_hex(16)}.json"
        try:
            fd = durable.create(temporary)
            try:
                durable.write_all(fd, data)
                durable.sync(fd)
            finally:
                os.close(fd)
            durable.publish(temporary, manifest_path(self._catalog, manifest.adapter_id))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
