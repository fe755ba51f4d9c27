"""The registry of adapters: ids, digests, states and leases. Pure state, no disk, no device; one thread owns it.

A version is one digest under one id. An id names its *current* version; when the content of an id is replaced, the old
version stays in service for the requests that hold it. A lease is a request's hold on a version. It is taken in one
step with the look-up, so no version can go between being found and being held.

    LOADING → ACTIVE → DRAINING → gone          FAILED, QUARANTINED: cannot serve, with a reason
"""

import bisect
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from pydantic import TypeAdapter

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference, in_tenant, name_of, tenant_of
from weft.errors import AdapterConflict, AdapterExists, AdapterNotFound, AdapterUnusable, DataLoss, WeftError

_NO_DIGEST = AdapterDigest("")


class AdapterState(StrEnum):
    """State of a version; requests can use it only if it is ACTIVE."""

    LOADING = "loading"
    ACTIVE = "active"
    DRAINING = "draining"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class Change(StrEnum):
    """Kind of change that watchers of the registry get."""

    ADDED = "added"
    UPDATED = "updated"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """Description of a version's content. packed_bytes: its size in memory.

    trained_held_as: how the base was held in training, if that differs from this server; "" if it does not, or if the
        file names no base.
    trained_rope_factors: the base's rotary factors in training (model/rope.py), if they differ from this server's,
        else "".
    invocation_tokens: the tokens from which on it acts (methods/activation.py); () if it acts everywhere.
    experts: those of a mixture, in the order of their digests; an id is the one in the mixture's file, or "".
    is_sequence_level: whether a mixture's gates depend on the whole prompt.
    """

    method: str = ""
    size_bytes: int = 0
    packed_bytes: int = 0
    rank: int = 0
    num_virtual_tokens: int = 0
    num_parameters: int = 0
    modules: tuple[str, ...] = ()
    base_model_name: str = ""
    trained_held_as: str = ""
    trained_rope_factors: str = ""
    invocation_tokens: tuple[int, ...] = ()
    experts: tuple[AdapterReference, ...] = ()
    is_sequence_level: bool = False

    def encode(self) -> str:
        """Return the description as JSON, for the store."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> "AdapterInfo":
        """Return the description that `encode` wrote. Raises ValueError for any other text."""
        return _INFOS.validate_json(text, strict=True)


_INFOS = TypeAdapter(AdapterInfo)


@dataclass(slots=True, kw_only=True, eq=False)
class Version:
    """One digest under one id. leases: the requests that hold it.

    digest: "" while a registration reads the content, and if its manifest is lost.
    removal: the error of all its requests, once the version is removed without waiting for them.
    """

    adapter_id: AdapterId
    digest: AdapterDigest = _NO_DIGEST
    info: AdapterInfo = AdapterInfo()
    create_time_s: float = 0.0
    state: AdapterState = AdapterState.ACTIVE
    state_reason: str = ""
    pinned: bool = False
    last_used_time_s: float | None = None
    leases: set[str] = field(default_factory=set)
    removal: WeftError | None = None


class Registry:
    """The versions of one server. changed(change, version): called after every change that a watcher sees."""

    def __init__(
        self,
        *,
        changed: Callable[[Change, Version], None] = lambda change, version: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._changed = changed
        self._wall_clock = wall_clock
        self._versions: dict[AdapterId, list[Version]] = {}  # the current one, then older ones that are still leased
        self._ids: list[AdapterId] = []  # sorted
        self._of: dict[AdapterDigest, list[Version]] = {}  # all versions whose digest is known
        self._drained_from: dict[AdapterId, AdapterState] = {}

    def __iter__(self) -> Iterator[Version]:
        """Yield the current versions, sorted by id."""
        return iter([self._versions[adapter_id][0] for adapter_id in self._ids])

    def after(self, adapter_id: str) -> Iterator[Version]:
        """Yield the current versions with later ids, sorted by id; nothing may be changed meanwhile."""
        for index in range(bisect.bisect_right(self._ids, adapter_id), len(self._ids)):
            yield self._versions[self._ids[index]][0]

    def of_tenant(self, tenant: str) -> Iterator[Version]:
        """Yield the current versions of a tenant, sorted by id; nothing may be changed meanwhile."""
        prefix = in_tenant(tenant, AdapterId(""))
        for version in self.after(prefix):
            if tenant_of(version.adapter_id) == tenant:
                yield version
            elif tenant:
                return  # ids of a tenant stand together

    def __len__(self) -> int:
        return len(self._versions)

    def versions(self, adapter_id: AdapterId) -> list[Version]:
        """Return the current version of an id, then the older ones that requests still hold, newest first."""
        return list(self._versions.get(adapter_id, ()))

    def current(self, adapter_id: AdapterId) -> Version | None:
        versions = self._versions.get(adapter_id)
        return versions[0] if versions else None

    def published(self, adapter_id: AdapterId) -> Version | None:
        """Return the current version of an id, unless its first registration has not ended."""
        version = self.current(adapter_id)
        is_new = version is not None and version.state is AdapterState.LOADING and not version.digest
        return None if is_new else version

    def of(self, digest: AdapterDigest) -> list[Version]:
        """Return every version with this content, under any id."""
        return list(self._of.get(digest, ()))

    def require(self, reference: AdapterReference, *, field: str = "adapter_id") -> Version:
        """Return the current version that `reference` names. Raises AdapterNotFound, with `field`, if there is none."""
        version = self.current(reference.adapter_id)
        if version is None or reference.digest not in (None, version.digest):
            raise not_found(reference, field)
        return version

    def require_active(self, reference: AdapterReference, *, field: str = "adapter_id") -> Version:
        """Return the current version that `reference` names, if requests can use it now.

        Raises AdapterNotFound, or AdapterUnusable or DataLoss with the reason of the state.
        """
        for version in self.versions(reference.adapter_id):  # an older content can be current again
            if reference.digest in (None, version.digest):
                if version.state is not AdapterState.ACTIVE:
                    raise _unusable(version, field)
                return version
        raise not_found(reference, field)

    def require_expert(self, expert: AdapterReference, *, tenant: str, field: str = "adapter_id") -> Version:
        """Return a version with this content that requests of a tenant can use now, under any of its ids.

        Of several, return the one under the id that the mixture names, else the first by id.
        Raises AdapterUnusable EXPERT_UNAVAILABLE if there is none.
        """

        def preference(version: Version) -> tuple[bool, bool, str]:
            is_other = name_of(version.adapter_id) != expert.adapter_id
            return version.state is not AdapterState.ACTIVE, is_other, version.adapter_id

        same = self.of(AdapterDigest(expert.digest or ""))
        own = [version for version in same if tenant_of(version.adapter_id) == tenant]
        best = min(own, key=preference, default=None)
        if best is not None and best.state is AdapterState.ACTIVE:
            return best
        state = "not registered" if best is None else best.state.value
        name = str(expert) if expert.adapter_id else expert.digest
        metadata = {"expert": expert.adapter_id, "digest": expert.digest, "state": state}
        raise AdapterUnusable.at("EXPERT_UNAVAILABLE", field, f"expert {name} is {state}", **metadata)

    def hold(self, version: Version, request_id: str) -> None:
        """Lease a version that `require_active` has just returned; nothing may be awaited in between."""
        version.leases.add(request_id)
        version.last_used_time_s = self._wall_clock()

    def release(self, version: Version, request_id: str) -> bool:
        """End a lease; return whether it was the last one of a version that is no longer current."""
        version.leases.remove(request_id)
        if version.leases or self.current(version.adapter_id) is version:
            return False
        self._versions[version.adapter_id].remove(version)
        self._forget(version)
        return True

    @contextlib.contextmanager
    def loading(self, adapter_id: AdapterId) -> Iterator[None]:
        """Make a free id LOADING inside the block, until `publish`."""
        if adapter_id not in self._versions:
            now_s, state = self._wall_clock(), AdapterState.LOADING
            self._versions[adapter_id] = [Version(adapter_id=adapter_id, create_time_s=now_s, state=state)]
            bisect.insort(self._ids, adapter_id)
        try:
            yield
        finally:
            if self.published(adapter_id) is None and self._versions.pop(adapter_id, None) is not None:
                self._drop_id(adapter_id)

    def check_publish(
        self, adapter_id: AdapterId, digest: AdapterDigest, *, replace: bool, expected_digest: str | None
    ) -> bool:
        """Return whether publishing would change anything; False if the content is current already.

        Raises AdapterExists if the id has other content and `replace` is not set, AdapterConflict if
        `expected_digest` is not current or the id is being removed, AdapterUnusable if this content is quarantined.
        """
        current = self.published(adapter_id)
        if current is not None and current.state is AdapterState.DRAINING:
            raise AdapterConflict.at(
                "ADAPTER_UNREGISTERED", "adapter_id", f"{name_of(adapter_id)} is being unregistered"
            )
        if current is not None and current.digest == digest:
            if current.state is AdapterState.QUARANTINED:
                raise _unusable(current)
            if current.state is AdapterState.ACTIVE:
                return False
        given = "" if current is None else current.digest
        require_expected(adapter_id, given, expected_digest)
        # An id whose files were lost has no digest; any registration repairs it.
        if not replace and given not in ("", digest):
            raise taken(adapter_id, given)
        return True

    def publish(self, version: Version) -> Version | None:
        """Make `version` current; return the one that it replaced, which stays as long as requests hold it."""
        previous = self.published(version.adapter_id)
        leased = [older for older in self.versions(version.adapter_id) if older.leases]
        if version.adapter_id not in self._versions:
            bisect.insort(self._ids, version.adapter_id)
        self._versions[version.adapter_id] = [version, *leased]
        self._drained_from.pop(version.adapter_id, None)
        self._of.setdefault(version.digest, []).append(version)
        self._changed(Change.ADDED if previous is None else Change.UPDATED, version)
        if previous is not None:
            previous.state = AdapterState.DRAINING
            if not previous.leases:
                self._forget(previous)
        return previous

    def drain(self, adapter_id: AdapterId, expected_digest: str | None) -> list[Version]:
        """Refuse new requests for an id, and return its versions. A second call raises AdapterNotFound."""
        version = self.published(adapter_id)
        if version is None or version.state is AdapterState.DRAINING:
            raise not_found(adapter_id)
        require_expected(adapter_id, version.digest, expected_digest)
        self._drained_from[adapter_id] = version.state
        self.move(version, AdapterState.DRAINING, version.state_reason)
        return self.versions(adapter_id)

    def revive(self, adapter_id: AdapterId) -> None:
        """Undo `drain`, because unregistering failed before anything was removed."""
        version = self._versions[adapter_id][0]
        self.move(version, self._drained_from.pop(adapter_id), version.state_reason)

    def remove(self, version: Version) -> bool:
        """Remove a version that no request holds; False if another one has become current meanwhile."""
        assert not version.leases, version
        if self.current(version.adapter_id) is not version:
            return False
        del self._versions[version.adapter_id]  # requests hold no older one
        self._drop_id(version.adapter_id)
        self._drained_from.pop(version.adapter_id, None)
        self._forget(version)
        self._changed(Change.REMOVED, version)
        return True

    def pin(self, version: Version, pinned: bool) -> None:
        if version.pinned != pinned:
            version.pinned = pinned
            self._changed(Change.UPDATED, version)

    def quarantine(self, digest: AdapterDigest, reason: str) -> list[Version]:
        """Take content out of service that fails by itself; return the versions that were in service."""
        active = [version for version in self.of(digest) if version.state is AdapterState.ACTIVE]
        for version in active:
            self.move(version, AdapterState.QUARANTINED, reason)
        return active

    def fail(self, digest: AdapterDigest, reason: str) -> None:
        """Mark content as FAILED, because its stored files are unusable, or unusable on this base."""
        for version in self.of(digest):
            if version.state is AdapterState.ACTIVE:
                self.move(version, AdapterState.FAILED, reason)

    def ready(self, version: Version, info: AdapterInfo) -> None:
        """Put a version in service that was LOADING, now that its content is known."""
        version.info = info
        self.move(version, AdapterState.ACTIVE, "")

    def move(self, version: Version, state: AdapterState, reason: str) -> None:
        """Change the state of a version."""
        version.state, version.state_reason = state, reason
        self._changed(Change.UPDATED, version)

    def _drop_id(self, adapter_id: AdapterId) -> None:
        del self._ids[bisect.bisect_left(self._ids, adapter_id)]

    def _forget(self, version: Version) -> None:
        same = self._of[version.digest]
        same.remove(version)
        if not same:
            del self._of[version.digest]


def require_expected(adapter_id: AdapterId, current: str, expected: str | None) -> None:
    """Raise AdapterConflict if an id has another digest than a caller expects; `current` is "" if it has none."""
    if expected is not None and expected != current:
        name = name_of(adapter_id)
        text = f"the current digest of {name} is {current or 'none'}"
        metadata = {"adapter_id": name, "limit": current, "given": expected}
        raise AdapterConflict.at("VERSION_CONFLICT", "expected_digest", text, **metadata)


def taken(adapter_id: AdapterId, current: str) -> AdapterExists:
    """Return the error for an id that has other content already."""
    name = name_of(adapter_id)
    text = f"{name} is registered with digest {current}; set replace to give it other content"
    return AdapterExists.at("ADAPTER_EXISTS", "adapter_id", text, adapter_id=name, digest=current)


def not_found(reference: AdapterReference | AdapterId, field: str = "adapter_id") -> AdapterNotFound:
    """Return the error for an unknown id, a foreign one, and a digest that is not current; all look the same."""
    name = str(reference) if isinstance(reference, AdapterReference) else name_of(reference)
    return AdapterNotFound.at("ADAPTER_NOT_FOUND", field, f"{name} is not registered", adapter_id=name)


def _unusable(version: Version, field: str = "adapter_id") -> AdapterUnusable | DataLoss:
    name, cause, retry_after_s = name_of(version.adapter_id), version.state_reason, None
    kind, reason, text = AdapterUnusable, "ADAPTER_NOT_READY", f"{name} is {version.state.value}"
    match version.state:
        case AdapterState.DRAINING:
            reason, text = "ADAPTER_DRAINING", f"{name}@{version.digest} is being taken out of service"
        case AdapterState.LOADING:
            retry_after_s = 1.0
        case AdapterState.QUARANTINED:
            reason = "ADAPTER_QUARANTINED"
            text = f"{name} was taken out of service: {cause}; register other content, or call LiftQuarantine"
        case AdapterState.FAILED if cause == "BLOB_CORRUPT":
            kind, reason, text = DataLoss, cause, f"the stored files of {name} changed; register it again"
    return kind.at(reason, field, text, adapter_id=name, cause=cause, retry_after_s=retry_after_s)
