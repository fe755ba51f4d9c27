"""The catalog: one manifest per adapter id, the small file that binds the id to a digest.

Manifests are the only files in the store that change. Each contains its own checksum and has exactly one spelling, so a
flipped bit anywhere in it is detected.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from weft import durable
from weft.adapters.identifiers import AdapterDigest, AdapterId, check_inner_id, is_digest, name_of
from weft.adapters.storage import storage_errors
from weft.adapters.strict_json import JsonFault, parse_object
from weft.errors import DataLoss, InvalidRequest, shown

MANIFEST_FORMAT = 3
MANIFEST_BYTES_MAX = 64 * 1024
LOCK_FILE = ".lock"  # lies beside the manifests, and is held during every change of the store
LOG_FILE = ".changes"  # likewise; the log of changed ids

_SUFFIX = ".json"
_TENANT_END = "."  # tenant.name.json: no id contains it
_FORMAT_OF = {"quarantined": 3, "info": 3, "checked_for": 3}  # the first format with a field; all others are in 1
_DIGEST_KEYS = {1: "generation", 2: "digest", 3: "digest"}  # by format; 1 and 2 are read, but not written

_TEXTS = ("adapter_id", "digest", "method", "create_time", "source", "quarantined", "info", "checked_for")
_FIELD_TYPES: dict[str, type] = dict.fromkeys(_TEXTS, str) | {"size_bytes": int, "pinned": bool}


class ManifestFault(ValueError):
    """Reason why some bytes are no manifest of this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The catalog's entry of one adapter id.

    method: the caller's name of the adapter's method; the store does not interpret it.
    create_time: when the id was bound to this digest; RFC 3339, UTC.
    source: the directory that was copied, or "" for an upload.
    quarantined: why this content was taken out of service under this id, or "".
    info: the caller's description of the content, which spares a start the reading of its files; "" if there is none.
    checked_for: the caller's name of the settings for which the content was checked and described, or "".
    """

    adapter_id: AdapterId
    digest: AdapterDigest
    size_bytes: int
    method: str
    pinned: bool
    create_time: str
    source: str
    quarantined: str = ""
    info: str = ""
    checked_for: str = ""

    def encode(self, manifest_format: int = MANIFEST_FORMAT) -> bytes:
        fields: dict[str, object] = {"format": manifest_format}
        fields |= {name: value for name, value in asdict(self).items() if _FORMAT_OF.get(name, 1) <= manifest_format}
        fields[_DIGEST_KEYS[manifest_format]] = fields.pop("digest")
        fields["checksum"] = hashlib.sha256(_spelled(fields)).hexdigest()
        return _spelled(fields)


class Problem(NamedTuple):
    """A fault in the store. It is reported and left as it is.

    path: below the store's root. adapter_id: the id that cannot be served because of it, or None.
    reason: MANIFEST_CORRUPT, BLOB_CORRUPT, UNKNOWN_FILE, STORE_FULL or STORE_UNAVAILABLE.
    """

    path: str
    adapter_id: AdapterId | None
    reason: str
    message: str


class Catalog(NamedTuple):
    """Every readable manifest, by id, and the problems of the others."""

    manifests: dict[AdapterId, Manifest]
    problems: tuple[Problem, ...]


def manifest_path(catalog: Path, adapter_id: AdapterId) -> Path:
    """Return the path of an id's manifest; no other code makes one."""
    return catalog / f"{check_inner_id(adapter_id).replace('/', _TENANT_END)}{_SUFFIX}"


def find_manifest(catalog: Path, adapter_id: AdapterId) -> Manifest | None:
    """Return the manifest of an id, or None. Raises DataLoss MANIFEST_CORRUPT if something else is in its place."""
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
        name = name_of(adapter_id)
        raise DataLoss("MANIFEST_CORRUPT", f"manifest of {name}: {fault}", metadata={"adapter_id": name}) from None


def _id_of(file_name: str) -> AdapterId:
    """Return the id of a manifest's file. Raises InvalidRequest if it is not one's name."""
    if not file_name.endswith(_SUFFIX):
        raise InvalidRequest.rule("ID_INVALID", "adapter_id", f"must end with {_SUFFIX}", given=file_name)
    tenant, _, name = file_name.removesuffix(_SUFFIX).rpartition(_TENANT_END)
    return check_inner_id(f"{tenant}/{name}" if tenant else name)


def scan_catalog(catalog: Path) -> list[tuple[AdapterId, os.stat_result] | Problem]:
    """Return the id and state of every manifest's file, in the order of names; any other file is a problem."""
    found: list[tuple[AdapterId, os.stat_result] | Problem] = []
    with storage_errors(), os.scandir(catalog) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name
            if name in (LOCK_FILE, LOG_FILE):
                continue
            try:
                adapter_id = _id_of(name)
            except InvalidRequest:
                found.append(Problem(f"catalog/{name}", None, "UNKNOWN_FILE", f"{shown(name)}: is no manifest"))
                continue
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found.append((adapter_id, entry.stat(follow_symlinks=False)))
    return found


def decode(data: bytes, adapter_id: AdapterId) -> Manifest:
    """Return the manifest in `data`. Raises ManifestFault unless it is byte for byte one written for `adapter_id`."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise ManifestFault("has too many bytes")
    try:
        fields = parse_object(data, depth_max=1)
    except JsonFault as fault:
        raise ManifestFault(str(fault)) from None
    manifest_format = fields.get("format")
    if type(manifest_format) is not int or manifest_format not in _DIGEST_KEYS:
        raise ManifestFault(f"has a format that is none of {', '.join(map(str, _DIGEST_KEYS))}")
    values = {name: fields.get(name) for name in _FIELD_TYPES if _FORMAT_OF.get(name, 1) <= manifest_format}
    values["digest"] = fields.get(_DIGEST_KEYS[manifest_format])
    for name, value in values.items():
        if type(value) is not _FIELD_TYPES[name]:
            raise ManifestFault(f"has no proper {name}")
    manifest = Manifest(**values)  # pyright: ignore[reportArgumentType]  # each type was just compared
    if not is_digest(manifest.digest):
        raise ManifestFault("has no proper digest")
    if manifest.adapter_id != adapter_id:
        raise ManifestFault("names another adapter id than its file")
    if manifest.encode(manifest_format) != data:
        raise ManifestFault("does not have its checksum")
    return manifest


def _spelled(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"
