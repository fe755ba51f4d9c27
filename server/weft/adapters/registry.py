"""Which adapters there are: ids, digests, states and leases. Pure state, no disk, no device; one thread owns it.

An id names its *current* version. A version is one digest under one id; replacing an id leaves the old version in
service for the requests that hold it. A lease is a request's hold on a version, taken with the look-up in one step, so
no version can go between being found and being held.

    LOADING → ACTIVE → DRAINING → gone          FAILED, QUARANTINED: cannot serve, with a reason
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference
from weft.errors import AdapterConflict, AdapterExists, AdapterNotFound, AdapterUnusable, DataLoss, WeftError

_FAULTS_UNTIL_QUARANTINE = 3


class AdapterState(StrEnum):
    """Whether requests can use a version."""

    LOADING = "loading"
    ACTIVE = "active"
    DRAINING = "draining"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class Change(StrEnum):
    """What watchers see happen to an id."""

    ADDED = "added"
    UPDATED = "updated"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What is known of a version's content. `packed_bytes` is what it takes in memory.

    trained_held_as: how the base was held in training, if that differs from this server's; "" if it does not, or if
        no base is named.
    trained_rope_factors: the base's rotary factors in training (model/rope.py) if they differ from this server's,
        else "".
    invocation_tokens: those from which on it acts (methods/activation.py); () is everywhere.
    experts: of a mixture, in the order of their digests; an id is what the expert was called, or "".
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


@dataclass(slots=True, kw_only=True, eq=False)
class Version:
    """One digest under one id. `leases` holds the requests that use it.

    removal: the error of all its requests, once the version is removed without waiting for them.
    """

    adapter_id: AdapterId
    digest: AdapterDigest
    info: AdapterInfo
    create_time_s: float
    state: AdapterState = AdapterState.ACTIVE
    state_reason: str = ""
    pinned: bool = False
    last_used_time_s: float | None = None
    leases: set[str] = field(default_factory=set)
    faults: int = 0
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
        self._current: dict[AdapterId, Version] = {}
        self._replaced: dict[AdapterId, list[Version]] = {}  # newest first; each still leased
        self._of: dict[AdapterDigest, list[Version]] = {}  # all of them, but those that are LOADING
        self._drained_from: dict[AdapterId, AdapterState] = {}

    def __iter__(self) -> Iterator[Version]:
        """Current versions by id."""
        return iter([self._current[adapter_id] for adapter_id in sorted(self._current)])

    def __len__(self) -> int:
        return len(self._current)

    def current(self, adapter_id: AdapterId) -> Version | None:
        """The id's current version."""
        return self._current.get(adapter_id)

    def replaced(self, adapter_id: AdapterId) -> list[Version]:
        """Older versions that requests still hold, newest first."""
        return list(self._replaced.get(adapter_id, ()))

    def versions(self, adapter_id: AdapterId) -> list[Version]:
        """Current and replaced versions of an id."""
        current = self._current.get(adapter_id)
        return ([] if current is None else [current]) + self.replaced(adapter_id)

    def of(self, digest: AdapterDigest) -> list[Version]:
        """Every version that is this content, under whatever id."""
        return list(self._of.get(digest, ()))

    def digests(self) -> frozenset[AdapterDigest]:
        """Every digest that some version needs."""
        return frozenset(self._of)

    def require(self, reference: AdapterReference, *, field: str = "adapter_id") -> Version:
        """The current version that `reference` names; AdapterNotFound otherwise, which names `field`."""
        version = self._current.get(reference.adapter_id)
        if version is None or reference.digest not in (None, version.digest):
            raise not_found(reference, field)
        return version

    def require_active(self, reference: AdapterReference, *, field: str = "adapter_id") -> Version:
        """The same if requests can use it now; else AdapterUnusable or DataLoss with the state's reason."""
        current = self._current.get(reference.adapter_id)
        if current is None or current.digest != reference.digest:  # an older content can be current again
            for version in self.replaced(reference.adapter_id):
                if version.digest == reference.digest:
                    raise _draining(version, field)
        version = self.require(reference, field=field)
        if version.state is not AdapterState.ACTIVE:
            raise _unusable(version, field)
        return version

    def require_expert(self, expert: AdapterReference, *, field: str = "adapter_id") -> Version:
        """A version that is this content and can be used now, under whatever id; AdapterUnusable EXPERT_UNAVAILABLE.

        Of several it is the one under the id that the mixture knows, else the first by id.
        """

        def preference(version: Version) -> tuple[bool, bool, str]:
            is_other = version.adapter_id != expert.adapter_id
            return version.state is not AdapterState.ACTIVE, is_other, version.adapter_id

        found = sorted(self.of(AdapterDigest(expert.digest or "")), key=preference)
        if found and found[0].state is AdapterState.ACTIVE:
            return found[0]
        state = found[0].state.value if found else "not registered"
        name = str(expert) if expert.adapter_id else expert.digest
        raise AdapterUnusable(
            "EXPERT_UNAVAILABLE",
            f"{field}: expert {name} is {state}",
            field=field,
            metadata={"expert": expert.adapter_id, "digest": expert.digest, "state": state},
        )

    def hold(self, version: Version, request_id: str) -> None:
        """Lease a version that `require_active` has just given: nothing may come between the two."""
        version.leases.add(request_id)
        version.last_used_time_s = self._wall_clock()

    def release(self, version: Version, request_id: str) -> bool:
        """End a lease; returns whether it was the last one of a version that is no longer current."""
        version.leases.remove(request_id)
        if version.leases or self._current.get(version.adapter_id) is version:
            return False
        replaced = self._replaced.get(version.adapter_id, [])
        if version in replaced:
            replaced.remove(version)
            if not replaced:
                del self._replaced[version.adapter_id]
            self._forget(version)
        return True

    def begin(self, adapter_id: AdapterId) -> None:
        """A free id is being registered: it is LOADING until `publish` or `abandon`."""
        if adapter_id not in self._current:
            self._current[adapter_id] = Version(
                adapter_id=adapter_id,
                digest=AdapterDigest(""),
                info=AdapterInfo(),
                create_time_s=self._wall_clock(),
                state=AdapterState.LOADING,
            )

    def abandon(self, adapter_id: AdapterId) -> None:
        """Registering failed: the id is free again, if it was."""
        version = self._current.get(adapter_id)
        if version is not None and version.state is AdapterState.LOADING:
            del self._current[adapter_id]

    def check_publish(
        self, adapter_id: AdapterId, digest: AdapterDigest, *, replace: bool, expected_digest: str | None
    ) -> bool:
        """Whether publishing changes anything (False: the content is current already).

        Raises AdapterExists without `replace`, AdapterConflict if `expected_digest` is not current or the id is
        being removed, AdapterUnusable for the very content that is quarantined.
        """
        version = self._current.get(adapter_id)
        current = None if version is None or version.state is AdapterState.LOADING else version
        if current is not None and current.state is AdapterState.DRAINING:
            raise AdapterConflict(
                "ADAPTER_UNREGISTERED", f"adapter_id: {adapter_id} is being unregistered", field="adapter_id"
            )
        if current is not None and current.digest == digest:
            if current.state is AdapterState.QUARANTINED:
                raise _unusable(current)
            if current.state is AdapterState.ACTIVE:
                return False
        given = "" if current is None else current.digest
        _require_expected(adapter_id, given, expected_digest)
        # An id whose files were lost has no digest; whatever is registered now repairs it.
        if current is not None and not replace and current.digest not in ("", digest):
            raise AdapterExists(
                "ADAPTER_EXISTS",
                f"adapter_id: {adapter_id} is registered with digest {given}; set replace to give it other content",
                field="adapter_id",
                metadata={"adapter_id": adapter_id, "digest": given},
            )
        return True

    def publish(self, version: Version) -> Version | None:
        """Make `version` current; returns the one it replaced, which stays if requests hold it."""
        previous = self._current.get(version.adapter_id)
        if previous is not None and previous.state is AdapterState.LOADING:
            previous = None
        self._current[version.adapter_id] = version
        self._of.setdefault(version.digest, []).append(version)
        self._changed(Change.ADDED if previous is None else Change.UPDATED, version)
        if previous is not None:
            previous.state = AdapterState.DRAINING
            if previous.leases:
                self._replaced.setdefault(version.adapter_id, []).insert(0, previous)
            else:
                self._forget(previous)
        return previous

    def drain(self, adapter_id: AdapterId, expected_digest: str | None) -> list[Version]:
        """Refuse new requests for an id; returns its versions. Only one caller gets them."""
        version = self._current.get(adapter_id)
        reference = AdapterReference(adapter_id, None)
        if version is None or version.state in (AdapterState.DRAINING, AdapterState.LOADING):
            raise not_found(reference)
        _require_expected(adapter_id, version.digest, expected_digest)
        self._drained_from[adapter_id] = version.state
        version.state = AdapterState.DRAINING
        self._changed(Change.UPDATED, version)
        return self.versions(adapter_id)

    def revive(self, adapter_id: AdapterId) -> None:
        """Unregistering failed before anything was removed: all is as it was."""
        version = self._current[adapter_id]
        version.state = self._drained_from.pop(adapter_id)
        self._changed(Change.UPDATED, version)

    def remove(self, adapter_id: AdapterId) -> None:
        """Forget a drained id."""
        version = self._current.pop(adapter_id)
        self._drained_from.pop(adapter_id, None)
        assert not version.leases, version
        self._forget(version)
        self._changed(Change.REMOVED, version)

    def pin(self, version: Version, pinned: bool) -> None:
        """Note that a version keeps its place on the device."""
        if version.pinned != pinned:
            version.pinned = pinned
            self._changed(Change.UPDATED, version)

    def fault(self, version: Version, reason: str) -> None:
        """A request failed by this adapter's fault; the third one quarantines it."""
        version.faults += 1
        if version.faults >= _FAULTS_UNTIL_QUARANTINE and version.state is AdapterState.ACTIVE:
            version.state, version.state_reason = AdapterState.QUARANTINED, reason
            self._changed(Change.UPDATED, version)

    def fail(self, digest: AdapterDigest, reason: str) -> None:
        """This content cannot be used: its stored files, or what the base makes of them, are no good."""
        for version in self.of(digest):
            if version.state is AdapterState.ACTIVE:
                version.state, version.state_reason = AdapterState.FAILED, reason
                self._changed(Change.UPDATED, version)

    def _forget(self, version: Version) -> None:
        same = self._of[version.digest]
        same.remove(version)
        if not same:
            del self._of[version.digest]


def _require_expected(adapter_id: AdapterId, current: str, expected: str | None) -> None:
    if expected is not None and expected != current:
        raise AdapterConflict(
            "VERSION_CONFLICT",
            f"expected_digest: the current digest of {adapter_id} is {current or 'none'}",
            field="expected_digest",
            metadata={"adapter_id": adapter_id, "limit": current, "given": expected},
        )


def not_found(reference: AdapterReference, field: str = "adapter_id") -> AdapterNotFound:
    """Unknown, foreign and no longer current answer alike."""
    return AdapterNotFound(
        "ADAPTER_NOT_FOUND",
        f"{field}: {reference} is not registered",
        field=field,
        metadata={"adapter_id": str(reference)},
    )


def _draining(version: Version, field: str) -> AdapterUnusable:
    return AdapterUnusable(
        "ADAPTER_DRAINING",
        f"{field}: {version.adapter_id}@{version.digest} is being taken out of service",
        field=field,
        metadata={"adapter_id": version.adapter_id},
    )


def _unusable(version: Version, field: str = "adapter_id") -> AdapterUnusable | DataLoss:
    name, cause, retry_after_s = version.adapter_id, version.state_reason, None
    kind, reason, text = AdapterUnusable, "ADAPTER_NOT_READY", f"{name} is {version.state.value}"
    match version.state:
        case AdapterState.DRAINING:
            return _draining(version, field)
        case AdapterState.LOADING:
            retry_after_s = 1.0
        case AdapterState.QUARANTINED:
            reason, text = "ADAPTER_QUARANTINED", f"{name} was taken out of service: {cause}"
        case AdapterState.FAILED if cause == "BLOB_CORRUPT":
            kind, reason, text = DataLoss, cause, f"the stored files of {name} changed; register it again"
    metadata = {"adapter_id": name, "cause": cause}
    return kind(reason, f"{field}: {text}", field=field, metadata=metadata, retry_after_s=retry_after_s)
