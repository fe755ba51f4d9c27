"""Files that nothing names any more: staging of dead processes, and versions without a manifest."""

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from weft import durable, failpoints
from weft.adapters.catalog import Problem
from weft.adapters.catalog_index import CatalogIndex
from weft.adapters.identifiers import AdapterDigest, check_digest
from weft.adapters.storage import named
from weft.adapters.versions import is_open


class Leftovers:
    """The files that one store may remove. Everything here is called under its lock.

    index: decides which versions are named; callers have just refreshed it.
    uncollected: versions that nothing named, but that were open or could not be removed.
    """

    def __init__(self, staging: Path, versions: Path, index: CatalogIndex) -> None:
        self._staging = staging
        self._versions = versions
        self._index = index
        self.uncollected: set[AdapterDigest] = set()

    def sweep_versions(self, digests: Iterable[AdapterDigest], problems: list[Problem]) -> tuple[AdapterDigest, ...]:
        """Remove those of these versions that no manifest names and no process has open; return the removed ones."""
        removed: list[AdapterDigest] = []
        for digest in sorted(digests):
            directory = self._versions / check_digest(digest)
            self.uncollected.discard(digest)
            if self._index.is_named(digest):
                continue
            try:
                if is_open(directory):
                    self.uncollected.add(digest)
                else:
                    self.take_away(directory)
                    removed.append(digest)
            except OSError as error:
                if os.path.lexists(directory):  # otherwise another process was first
                    self.uncollected.add(digest)
                    problems.append(_left_over(f"versions/{digest}", error))
        return tuple(removed)

    def take_away(self, directory: Path) -> None:
        """Remove a version, first from view and then from the disk."""
        trash = self._staging / secrets.token_hex(16)
        os.rename(directory, trash)
        failpoints.hit("before_gc_unlink")
        durable.remove_tree(trash)
        failpoints.hit("after_gc_unlink")

    def sweep_staging(self, problems: list[Problem]) -> int:
        """Remove the leftovers of dead processes; return how many uploads and temporary files there were."""
        swept: set[str] = set()
        for name in sorted(os.listdir(self._staging)):  # "<token>" before "<token>.lock"
            token = name.partition(".")[0]
            try:
                if self._is_owned(token):
                    continue
                failpoints.hit("before_sweep")
                path = self._staging / name
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    durable.remove_tree(path)
                else:
                    os.unlink(path)
                failpoints.hit("after_sweep")
                swept.add(token)
            except FileNotFoundError:
                continue  # its owner was just removing it
            except OSError as error:
                problems.append(_left_over(f"staging/{name}", error))
        return len(swept)

    def _is_owned(self, token: str) -> bool:
        try:
            return durable.is_locked(self._staging / f"{token}.lock")
        except FileNotFoundError:
            return False


def _left_over(path: str, error: OSError) -> Problem:
    cause = named(error)
    return Problem(path, None, cause.reason, f"{path}: could not be removed: {cause.message}")
