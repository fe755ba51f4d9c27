"""The manifest: the small file that binds an adapter id to a generation.

It is the only thing in the store that changes. It carries its own checksum and has exactly one spelling, so a flipped
bit anywhere in it is noticed and not obeyed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from weft.adapters.identifiers import AdapterId, Generation, check_adapter_id, check_generation
from weft.adapters.strict_json import JsonFault, parse_object
from weft.errors import InvalidRequest

MANIFEST_FORMAT = 1
MANIFEST_BYTES_MAX = 64 * 1024

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


def decode(data: bytes, adapter_id: AdapterId) -> Manifest:
    """The manifest in `data`, or ManifestFault if it is not, byte for byte, one that was written for `adapter_id`."""
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
    try:
        check_generation(manifest.generation)
    except InvalidRequest as error:
        raise ManifestFault(error.message) from None
    if manifest.adapter_id != check_adapter_id(adapter_id):
        raise ManifestFault("names another adapter id than its file")
    if manifest.encode() != data:
        raise ManifestFault("does not have its checksum")
    return manifest


def _spelled(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"
