"""The token file: which tokens a server accepts, and of whom they are.

    {"format": 1, "tokens": [{"id": "…", "sha256": "…", "tenant": "acme", "roles": ["generate"],
                              "created": "2026-11-30T12:00:00+00:00", "expires": null}]}

It holds no secret that opens anything, but whoever writes it decides who has access, so its mode is that of a secret.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from weft import durable
from weft.adapters.strict_json import DuplicateKeyFault, JsonFault, parse_object
from weft.api.access.principal import Principal, Role, Via
from weft.api.access.secret_file import UnusableAccess, read
from weft.api.access.token import ID_PATTERN
from weft.errors import shown

KNOB = "token_file"
TENANT_PATTERN = re.compile("[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")

_FORMAT = 1
_DEPTH_MAX = 4
_SHA256 = re.compile("[0-9a-f]{64}")
_KEYS = {"id", "sha256", "tenant", "roles", "created", "expires"}
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """One entry of the file: everything about a token except its secret. `expires` is None for a token without end."""

    token_id: str
    sha256: str
    tenant: str
    roles: frozenset[Role]
    created: datetime
    expires: datetime | None

    @property
    def principal(self) -> Principal:
        """The caller that this token identifies."""
        return Principal(tenant=self.tenant, roles=self.roles, token_id=self.token_id, via=Via.TOKEN)

    def has_expired(self, now_s: float) -> bool:
        """Return whether the token has ended at a time in seconds since 1970."""
        return self.expires is not None and now_s >= self.expires.timestamp()


def load(path: Path) -> dict[str, StoredToken]:
    """Return the tokens of a file by id. Raises UnusableAccess if it is not private, or not exactly of the form."""
    content = read(path, KNOB)
    try:
        found = parse_object(content, depth_max=_DEPTH_MAX)
        if found.keys() != {"format", "tokens"}:
            raise _Fault(f"must have the keys format and tokens, given {', '.join(map(shown, found))}")
        if found["format"] != _FORMAT:
            raise _Fault(f"format must be {_FORMAT}, given {shown(found['format'])}")
        if not isinstance(found["tokens"], list):
            raise _Fault("tokens must be a list")
        tokens = [_entry(f"tokens[{number}]", entry) for number, entry in enumerate(found["tokens"])]
    except DuplicateKeyFault as fault:
        raise UnusableAccess(f"{KNOB}: {path} {fault}: {shown(fault.name)}") from None
    except (_Fault, JsonFault) as fault:
        raise UnusableAccess(f"{KNOB}: {path} {fault}; make it with `weft tokens add`") from None
    by_id = {token.token_id: token for token in tokens}
    if len(by_id) < len(tokens):
        raise UnusableAccess(f"{KNOB}: {path} holds an id twice")
    return by_id


def add(path: Path, token: StoredToken) -> None:
    """Add a token, in a new file if there is none. The change is atomic and durable, and excludes other writers."""

    def with_it(tokens: dict[str, StoredToken]) -> dict[str, StoredToken]:
        assert token.token_id not in tokens, "a random id of 48 bits is new"
        return {**tokens, token.token_id: token}

    _change(path, with_it, create=True)


def remove(path: Path, token_id: str) -> StoredToken | None:
    """Remove a token and return it, or None if the file has no such id. The change is as that of `add`."""
    removed: list[StoredToken] = []

    def without_it(tokens: dict[str, StoredToken]) -> dict[str, StoredToken]:
        removed.extend(token for token in tokens.values() if token.token_id == token_id)
        return {name: token for name, token in tokens.items() if name != token_id}

    _change(path, without_it, create=False)
    return removed[0] if removed else None


class _Fault(ValueError):
    """A fault of the content; the message continues a sentence that starts with the file's path."""


def _entry(place: str, entry: object) -> StoredToken:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _Fault(f"{place} must have the keys {', '.join(sorted(_KEYS))}")
    given: dict[str, Any] = entry
    for key, pattern in (("id", ID_PATTERN), ("sha256", _SHA256), ("tenant", TENANT_PATTERN)):
        if not isinstance(given[key], str) or not pattern.fullmatch(given[key]):
            raise _Fault(f"{place}.{key} must match {pattern.pattern}")
    roles = given["roles"]
    if not isinstance(roles, list) or not roles or any(role not in tuple(Role) for role in roles):
        raise _Fault(f"{place}.roles must be a list of at least one of {', '.join(Role)}")
    return StoredToken(
        token_id=given["id"],
        sha256=given["sha256"],
        tenant=given["tenant"],
        roles=frozenset(map(Role, roles)),
        created=_moment(f"{place}.created", given["created"]),
        expires=None if given["expires"] is None else _moment(f"{place}.expires", given["expires"]),
    )


def _moment(place: str, value: object) -> datetime:
    try:
        moment = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise _Fault(f"{place} must be a time with its zone, such as 2026-11-30T12:00:00+00:00, given {shown(value)}")
    return moment


def _change(path: Path, changed: Callable[[dict[str, StoredToken]], dict[str, StoredToken]], *, create: bool) -> None:
    path = path.resolve()  # a link stays one
    with durable.locked(path.with_name(f".{path.name}.lock"), timeout_s=_LOCK_TIMEOUT_S):
        tokens = {} if create and not path.exists() else load(path)
        _write(path, changed(tokens).values())


def _write(path: Path, tokens: Iterable[StoredToken]) -> None:
    entries = [
        {
            "id": token.token_id,
            "sha256": token.sha256,
            "tenant": token.tenant,
            "roles": sorted(token.roles),
            "created": token.created.isoformat(timespec="seconds"),
            "expires": None if token.expires is None else token.expires.isoformat(timespec="seconds"),
        }
        for token in tokens
    ]
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = durable.create(staged)
    try:
        try:
            if path.exists():  # a file of root that a group may read stays one
                before = path.stat()
                os.fchown(fd, before.st_uid, before.st_gid)
                os.fchmod(fd, before.st_mode & 0o640)
            durable.write_all(fd, json.dumps({"format": _FORMAT, "tokens": entries}, indent=1).encode() + b"\n")
            durable.sync(fd)
        finally:
            os.close(fd)
        durable.publish(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
