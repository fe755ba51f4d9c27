"""A copy of the catalog in memory, which follows changes of other threads and processes at the cost of the changes."""

import os
import threading
from pathlib import Path

from weft.adapters.catalog import Catalog, Manifest, Problem, find_manifest, manifest_path, scan_catalog
from weft.adapters.change_log import ChangeLog, Position
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.storage import storage_errors
from weft.errors import DataLoss, WeftError

_Signature = tuple[int, int, int]  # of a manifest's file: mtime in ns, inode, size


class CatalogIndex:
    """What the catalog said at the last `refresh`. Any thread may call it; `refresh` and `look_at` block on the disk.

    Under the store's lock, right after a `refresh`, it is the catalog. `log`: where the store writes its changes.
    """

    def __init__(self, catalog: Path, log: ChangeLog) -> None:
        self._catalog = catalog
        self._log = log
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._mtime_ns = 0
        self._signatures: dict[AdapterId, _Signature] = {}
        self._entries: dict[AdapterId, Manifest | Problem] = {}
        self._unreadable: set[AdapterId] = set()
        self._unread: set[AdapterId] = set()  # because of a fault of the disk, which may pass
        self._unknown: tuple[Problem, ...] = ()
        self._ids: dict[AdapterDigest, set[AdapterId]] = {}
        self._changed: set[AdapterId] = set()

    def get(self, adapter_id: AdapterId) -> Manifest | Problem | None:
        """Return an id's manifest, or why it cannot be read, or None; never waits."""
        return self._entries.get(adapter_id)

    def catalog(self) -> Catalog:
        with self._lock:
            entries = dict(sorted(self._entries.items()))
            manifests = {adapter_id: entry for adapter_id, entry in entries.items() if isinstance(entry, Manifest)}
            problems = [entry for entry in entries.values() if isinstance(entry, Problem)]
            return Catalog(manifests, (*self._unknown, *problems))

    def is_named(self, digest: AdapterDigest) -> bool:
        """Return whether a manifest names a digest, or may: one that cannot be read may name any."""
        return digest in self._ids or bool(self._unreadable)

    def refresh(self) -> None:
        """Read what has changed since the last call. Raises Unavailable if the catalog cannot be read."""
        with self._lock, storage_errors():
            news = self._log.read(self._position or Position())
            mtime_ns = os.stat(self._catalog).st_mtime_ns
            if news.ids == frozenset() and mtime_ns != self._mtime_ns:
                # Logged between the two reads, or made by other means than a store of this version.
                news = self._log.read(self._position or Position())
                if news.ids == frozenset():
                    news = news._replace(ids=None)
            if self._position is None or news.ids is None:
                self._read_all()
            else:
                for adapter_id in news.ids:
                    self._look_at(adapter_id)
                    self._changed.add(adapter_id)  # files can be repaired under the same manifest
            for adapter_id in list(self._unread):
                self._look_at(adapter_id)
            self._position, self._mtime_ns = news.position, mtime_ns

    def look_at(self, adapter_id: AdapterId) -> None:
        """Read one id's manifest again."""
        with self._lock:
            self._look_at(adapter_id)

    def take_changed(self) -> set[AdapterId]:
        """Return the ids that were changed, or found changed, since the last call."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def _read_all(self) -> None:
        found: dict[AdapterId, _Signature] = {}
        unknown: list[Problem] = []
        for entry in scan_catalog(self._catalog):
            if isinstance(entry, Problem):
                unknown.append(entry)
            else:
                adapter_id, stat = entry
                found[adapter_id] = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        self._unknown = tuple(unknown)
        for adapter_id in list(self._entries):
            if adapter_id not in found:
                self._put(adapter_id, None)
        for adapter_id, signature in found.items():
            if self._signatures.get(adapter_id) != signature or adapter_id in self._unreadable:
                self._look_at(adapter_id)
                self._signatures[adapter_id] = signature

    def _look_at(self, adapter_id: AdapterId) -> None:
        self._unread.discard(adapter_id)
        try:
            found = find_manifest(self._catalog, adapter_id)
        except WeftError as error:
            if not isinstance(error, DataLoss):
                self._unread.add(adapter_id)
            path = f"catalog/{manifest_path(self._catalog, adapter_id).name}"
            found = Problem(path, adapter_id, error.reason, error.message)
        self._put(adapter_id, found)

    def _put(self, adapter_id: AdapterId, found: Manifest | Problem | None) -> None:
        self._signatures.pop(adapter_id, None)
        if found == self.get(adapter_id):
            return
        self._changed.add(adapter_id)
        known = self._entries.get(adapter_id)
        if isinstance(known, Manifest):
            same = self._ids[known.digest]
            same.discard(adapter_id)
            if not same:
                del self._ids[known.digest]
        self._unreadable.discard(adapter_id)
        if found is None:
            del self._entries[adapter_id]
            return
        self._entries[adapter_id] = found
        if isinstance(found, Manifest):
            self._ids.setdefault(found.digest, set()).add(adapter_id)
        else:
            self._unreadable.add(adapter_id)
