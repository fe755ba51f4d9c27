"""A ledger of acknowledged changes: what a store may hold for each id, and what was lost."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from weft.adapters.catalog import find_manifest
from weft.adapters.identifiers import AdapterId


class Lost(NamedTuple):
    """An id that does not hold what it may hold; "" is unbound."""

    adapter_id: str
    possible: frozenset[str]
    found: str


class Ledger:
    """The digests that each id may have: one after an acknowledgement, two after a call that was cut off."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._possible = {adapter_id: frozenset({""}) for adapter_id in ids}

    def __getitem__(self, adapter_id: str) -> str:
        """Return the digest of an id, which must be certain."""
        [found] = self._possible[adapter_id]
        return found

    def acknowledged(self, adapter_id: str, digest: str) -> None:
        self._possible[adapter_id] = frozenset({digest})

    def cut_off(self, adapter_id: str, digest: str) -> None:
        self._possible[adapter_id] |= {digest}

    def judge(self, catalog: Path) -> list[Lost]:
        """Compare with the store; afterwards the ledger is certain again."""
        lost = []
        for adapter_id, possible in self._possible.items():
            manifest = find_manifest(catalog, AdapterId(adapter_id))
            found = "" if manifest is None else manifest.digest
            if found not in possible:
                lost.append(Lost(adapter_id, possible, found))
            self._possible[adapter_id] = frozenset({found})
        return lost
