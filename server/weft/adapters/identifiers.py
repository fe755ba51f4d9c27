"""Adapter ids, digests and references, checked here and nowhere else.

    adapter id   [a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?   the public name; at most 63 characters, no dots, no slashes
    digest       64 lower-case hex digits              the sha256 of the content (`weft.adapters.versions`)
    reference    adapter_id or adapter_id@digest
    tenant       spelled like an adapter id; "" is the one of servers without tokens

Tenants have namespaces of their own. Inside the server, the id of a tenant's adapter is tenant/adapter_id, so that no
look-up can find another tenant's; callers see and write the name alone (`Scope`).

The alphabet has no character with a meaning to a file system, a shell, a log line or a URL, and no two ids look alike:
an upper-case, decomposed or look-alike spelling is refused, never normalized into another id.
"""

import re
from typing import NamedTuple, NewType

from weft.errors import InvalidRequest, shown

AdapterId = NewType("AdapterId", str)
AdapterDigest = NewType("AdapterDigest", str)

ADAPTER_ID_CHARACTERS_MAX = 63
ADAPTER_ID_PATTERN = "[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?"
RESERVED_ADAPTER_IDS = frozenset({"base", "default"})

_ADAPTER_ID = re.compile(ADAPTER_ID_PATTERN)
_DIGEST = re.compile("[0-9a-f]{64}")


class AdapterReference(NamedTuple):
    """The adapter that a request names: an id, and the digest that it must have, if one is given."""

    adapter_id: AdapterId
    digest: AdapterDigest | None

    def __str__(self) -> str:
        name = name_of(self.adapter_id)
        return name if self.digest is None else f"{name}@{self.digest}"


class Scope(NamedTuple):
    """The adapters that a caller can name and see: its tenant's, or with `sees_all` also others', as tenant/name."""

    tenant: str = ""
    sees_all: bool = False

    def adapter_id(self, value: str, *, base_model: str = "", field: str = "adapter_id") -> AdapterId:
        """Return the id inside the server of the adapter that a caller names. Raises as `check_adapter_id`."""
        tenant, slash, name = value.partition("/")
        if slash and self.sees_all and _ADAPTER_ID.fullmatch(tenant):
            return in_tenant(tenant, check_adapter_id(name, base_model=base_model, field=field))
        return in_tenant(self.tenant, check_adapter_id(value, base_model=base_model, field=field))

    def reference(self, value: str, *, base_model: str = "", field: str = "adapter_id") -> AdapterReference:
        """Split `adapter_id` or `adapter_id@digest`, and check each part by its own rule."""
        adapter_id, at, digest = value.partition("@")
        return AdapterReference(
            self.adapter_id(adapter_id, base_model=base_model, field=field),
            check_digest(digest, field=field) if at else None,
        )

    def includes(self, adapter_id: AdapterId) -> bool:
        """Return whether the caller may see an adapter."""
        return self.sees_all or tenant_of(adapter_id) == self.tenant

    def shown(self, adapter_id: AdapterId) -> str:
        """Return an id as the caller writes it."""
        return name_of(adapter_id) if tenant_of(adapter_id) == self.tenant else adapter_id


NO_TENANT = Scope()


def in_tenant(tenant: str, name: AdapterId) -> AdapterId:
    """Return the id inside the server of a tenant's adapter."""
    return AdapterId(f"{tenant}/{name}") if tenant else name


def tenant_of(adapter_id: AdapterId) -> str:
    """Return the tenant of an adapter, "" for one without."""
    return adapter_id.rpartition("/")[0]


def name_of(adapter_id: AdapterId) -> AdapterId:
    """Return the id as its tenant writes it."""
    return AdapterId(adapter_id.rpartition("/")[2])


def check_inner_id(value: str) -> AdapterId:
    """Return `value`, which was found and not given, as an id inside the server. Raises InvalidRequest."""
    tenant, slash, name = value.rpartition("/")
    if slash and not _ADAPTER_ID.fullmatch(tenant):
        raise InvalidRequest.rule("ID_INVALID", "tenant", f"must match {ADAPTER_ID_PATTERN}", given=tenant)
    return in_tenant(tenant, check_adapter_id(name))


def check_adapter_id(value: str, *, base_model: str = "", field: str = "adapter_id") -> AdapterId:
    """Return `value` as an id. No adapter may take the name of `base_model`, or the last component of it as a path.

    Raises InvalidRequest ID_INVALID or ID_RESERVED.
    """
    if not value.strip():
        raise InvalidRequest.at("ID_INVALID", field, "must not be empty", given=value)
    if len(value) > ADAPTER_ID_CHARACTERS_MAX:
        limit, given = ADAPTER_ID_CHARACTERS_MAX, len(value)
        raise InvalidRequest.rule("ID_INVALID", field, "has too many characters", limit=limit, given=given)
    last = base_model.rpartition("/")[2]
    if value in {*RESERVED_ADAPTER_IDS, base_model, base_model.lower(), last, last.lower()}:
        raise InvalidRequest.rule("ID_RESERVED", field, "is reserved for the base model", given=value)
    if not _ADAPTER_ID.fullmatch(value):
        raise InvalidRequest.rule("ID_INVALID", field, f"must match {ADAPTER_ID_PATTERN}", given=value)
    return AdapterId(value)


def is_digest(value: str) -> bool:
    """Return whether a name that was found, not given, is a digest."""
    return _DIGEST.fullmatch(value) is not None


def check_digest(value: str, *, field: str = "digest", reason: str = "ID_INVALID") -> AdapterDigest:
    """Return `value` as a digest.

    Raises InvalidRequest with `reason`, also for an abbreviation, because a digest names content exactly.
    """
    if not is_digest(value):
        raise InvalidRequest.rule(reason, field, "must be 64 lower-case hex digits", given=value)
    return AdapterDigest(value)


def parse_reference(value: str, *, base_model: str = "", field: str = "adapter_id") -> AdapterReference:
    """Return the reference of a caller without a tenant; see `Scope.reference`."""
    return NO_TENANT.reference(value, base_model=base_model, field=field)


def abbreviated(digest: AdapterDigest) -> str:
    """Return the beginning of a digest, for people and log lines only; no call accepts it back."""
    return shown(digest[:12])
