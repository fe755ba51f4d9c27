"""The catalog: one manifest per adapter id, the small file that binds the id to a generation.

Manifests are the only thing in the store that changes. Each carries its own checksum and has exactly one spelling, so a
flipped bit anywhere in it is noticed and not obeyed.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from weft import durable
from weft.adapters.identifiers import AdapterId, Generation, check_adapter_id, is_generation
from weft.adapters.storage import storage_errors
from weft.adapters.strict_json import JsonFault, parse_object
from weft.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    DataLoss,
    InvalidRequest,
    Unavailable,
    shown,
)

MANIFEST_FORMAT = 1
MANIFEST_BYTES_MAX = 64 * 1024
LOCK_FILE = ".lock"  # lies beside the manifests; whoever changes the store holds it

_SUFFIX = ".json"

_FIELD_TYPES: dict[str, type] = {
    "adapter_id": str,
    "generation": str,
    "size_bytes": int,
    "method": str,
    "pinned": bool,
    "create_time": str,
    "source": str,
}


class ManifestFault(ValueError):
    """Why the bytes are no manifest of this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the catalog says of one adapter id.

    method: the caller's word for what the adapter is; the store does not read it.
    create_time: RFC 3339, UTC: when the id was bound to this generation.
    source: where a local copy was taken from, or "" for an upload.
    """

    adapter_id: AdapterId
    generation: Generation
    size_bytes: int
    method: str
    pinned: bool
    create_time: str
    source: str

    def encode(self) -> bytes:
        fields: dict[str, object] = {"format": MANIFEST_FORMAT, **asdict(self)}
        fields["checksum"] = hashlib.sha256(_spelled(fields)).hexdigest()
        return _spelled(fields)


class Problem(NamedTuple):
    """Something in the store that is not as it should be. It is reported and left alone.

    path: below the store's root. adapter_id: the id that cannot be served because of it, if it is one.
    reason: MANIFEST_CORRUPT, BLOB_CORRUPT, UNKNOWN_FILE, STORE_FULL or STORE_UNAVAILABLE.
    """

    path: str
    adapter_id: AdapterId | None
    reason: str
    message: str


class Catalog(NamedTuple):
    """Every readable manifest, by id, and what was not readable."""

    manifests: dict[AdapterId, Manifest]
    problems: tuple[Problem, ...]


def manifest_path(catalog: Path, adapter_id: AdapterId) -> Path:
    """The one way from an id to a path."""
    return catalog / f"{check_adapter_id(adapter_id)}{_SUFFIX}"


def find_manifest(catalog: Path, adapter_id: AdapterId) -> Manifest | None:
    """The manifest of an id, None without one, DataLoss MANIFEST_CORRUPT if something else is in its place."""
    path = manifest_path(catalog, adapter_id)
    try:
        with storage_errors():
            try:
                with durable.open_regular(path) as file:
                    data = file.read(MANIFEST_BYTES_MAX + 1)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno in durable.NOT_REGULAR:
                    raise ManifestFault("is not a file") from None
                raise
        return decode(data, adapter_id)
    except ManifestFault as fault:
        raise DataLoss(
            "MANIFEST_CORRUPT", f"manifest of {adapter_id}: {fault}", metadata={"adapter_id": adapter_id}
        ) from None


def read_catalog(catalog: Path) -> Catalog:
    manifests: dict[AdapterId, Manifest] = {}
    problems: list[Problem] = []
    with storage_errors():
        names = sorted(os.listdir(catalog))
    for name in names:
        if name == LOCK_FILE:
            continue
        try:
            adapter_id = check_adapter_id(name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else "")
        except InvalidRequest:
            problems.append(Problem(f"catalog/{name}", None, "UNKNOWN_FILE", f"{shown(name)}: is no manifest"))
            continue
        try:
            manifest = find_manifest(catalog, adapter_id)
        except (DataLoss, Unavailable) as error:
            problems.append(Problem(f"catalog/{name}", adapter_id, error.reason, error.message))
        else:
            if manifest is not None:
                manifests[adapter_id] = manifest
    return Catalog(manifests, tuple(problems))


def decode(data: bytes, adapter_id: AdapterId) -> Manifest:
    """The manifest in `data`, or ManifestFault if it is not, byte for byte, one that was written for `adapter_id`."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise ManifestFault("has too many bytes")
    try:
        fields = parse_object(data, depth_max=1)
    except JsonFault as fault:
        raise ManifestFault(str(fault)) from None
    if fields.get("format") != MANIFEST_FORMAT:
        raise ManifestFault(f"has another format than {MANIFEST_FORMAT}")
    values = {name: fields.get(name) for name in _FIELD_TYPES}
    for name, value in values.items():
        if type(value) is not _FIELD_TYPES[name]:
            raise ManifestFault(f"has no proper {name}")
    manifest = Manifest(**values)  # pyright: ignore[reportArgumentType]  # each type was just compared
    if not is_generation(manifest.generation):
        raise ManifestFault("has no proper generation")
    if manifest.adapter_id != adapter_id:
        raise ManifestFault("names another adapter id than its file")
    if manifest.encode() != data:
        raise ManifestFault("does not have its checksum")
    return manifest


def _spelled(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"


def require_expected(adapter_id: AdapterId, expected: Generation, current: Manifest | None) -> None:
    if current is not None and current.generation == expected:
        return
    found = "none" if current is None else current.generation
    raise AdapterConflict(
        "VERSION_CONFLICT",
        f"adapter_id {adapter_id}: expected generation {expected}, found {found}",
        field="expected_generation",
        metadata={"adapter_id": adapter_id, "expected": expected, "given": found},
    )


def taken(current: Manifest) -> AdapterExists:
    return AdapterExists(
        "ADAPTER_EXISTS",
        f"adapter_id {current.adapter_id}: holds generation {current.generation}; set replace to change it",
        field="adapter_id",
        metadata={"adapter_id": current.adapter_id, "generation": current.generation},
    )


def no_adapter(adapter_id: AdapterId) -> AdapterNotFound:
    return AdapterNotFound("ADAPTER_NOT_FOUND", f"adapter_id: no adapter {adapter_id}", field="adapter_id")
