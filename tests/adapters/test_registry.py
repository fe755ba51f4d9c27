"""Ids, digests, states and leases: the dictionary behind every request."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference
from weft.adapters.registry import AdapterInfo, AdapterState, Change, Registry, Version
from weft.errors import AdapterConflict, AdapterExists, AdapterNotFound, AdapterUnusable, DataLoss, WeftError

NAME, OTHER = AdapterId("name"), AdapterId("other")
A, B, C = (AdapterDigest(letter * 64) for letter in "abc")


def digests(registry: Registry) -> set[AdapterDigest]:
    """Return the digests of which the registry has a version."""
    return {digest for digest in (A, B, C, AdapterDigest("")) if registry.of(digest)}


class Observed:
    """A registry and all its reports."""

    def __init__(self) -> None:
        self.idle: list[Version] = []
        self.changes: list[tuple[Change, str]] = []
        self.now = 100.0
        self.registry = Registry(
            changed=lambda change, version: self.changes.append((change, version.digest[:1])),
            wall_clock=lambda: self.now,
        )

    def publish(self, digest: AdapterDigest, adapter_id: AdapterId = NAME) -> Version:
        version = Version(adapter_id=adapter_id, digest=digest, info=AdapterInfo(), create_time_s=0.0)
        previous = self.registry.publish(version)
        if previous is not None and not previous.leases:
            self.idle.append(previous)
        return version

    def release(self, version: Version, request_id: str) -> None:
        if self.registry.release(version, request_id):
            self.idle.append(version)

    def remove(self, adapter_id: AdapterId) -> None:
        version = self.registry.current(adapter_id)
        assert version is not None
        assert self.registry.remove(version)

    def acquire(self, request_id: str, digest: AdapterDigest | None = None) -> Version:
        version = self.registry.require_active(AdapterReference(NAME, digest))
        self.registry.hold(version, request_id)
        return version

    def refusal(self, digest: AdapterDigest | None = None) -> WeftError:
        before = [set(version.leases) for version in self.registry.versions(NAME)]
        with pytest.raises(WeftError) as caught:
            self.acquire("refused", digest)
        assert [set(version.leases) for version in self.registry.versions(NAME)] == before, "a refusal holds nothing"
        return caught.value


@pytest.fixture
def observed() -> Observed:
    return Observed()


# -- look-up and lease -----------------------------------------------------------------------------------------------


def test_a_lease_is_taken_with_the_look_up_and_ends_once(observed: Observed) -> None:
    observed.publish(A)
    version = observed.acquire("r")
    assert (version.digest, version.leases, version.last_used_time_s) == (A, {"r"}, 100.0)
    observed.release(version, "r")
    assert (version.leases, observed.idle) == (set(), [])
    with pytest.raises(KeyError):
        observed.release(version, "r")


def test_an_id_or_a_digest_that_is_not_current_is_not_found(observed: Observed) -> None:
    assert isinstance(observed.refusal(), AdapterNotFound)
    observed.publish(A)
    assert isinstance(observed.refusal(B), AdapterNotFound)
    assert observed.acquire("r", A).digest == A
    foreign = observed.refusal(B)
    assert foreign.message == f"adapter_id: {NAME}@{B} is not registered", "nothing of what is registered shows"


def test_running_requests_keep_the_replaced_version_and_new_ones_get_the_new(observed: Observed) -> None:
    observed.publish(A)
    old = observed.acquire("old")
    observed.publish(B)
    assert observed.acquire("new").digest == B
    assert old.state is AdapterState.DRAINING
    assert [version.digest for version in observed.registry.versions(NAME)] == [B, A]
    assert digests(observed.registry) == {A, B}
    error = observed.refusal(A)
    assert (type(error), error.reason) == (AdapterUnusable, "ADAPTER_DRAINING")
    observed.release(old, "old")
    assert observed.idle == [old]
    assert digests(observed.registry) == {B}
    assert isinstance(observed.refusal(A), AdapterNotFound)


def test_a_replaced_version_without_requests_is_idle_at_once(observed: Observed) -> None:
    old = observed.publish(A)
    observed.publish(B)
    assert observed.idle == [old]
    assert observed.registry.versions(NAME)[1:] == []


def test_the_last_lease_of_a_replaced_version_makes_it_idle(observed: Observed) -> None:
    observed.publish(A)
    old = observed.acquire("one")
    observed.acquire("two")
    observed.publish(B)
    observed.release(old, "one")
    assert observed.idle == []
    observed.release(old, "two")
    assert observed.idle == [old]


def test_content_that_comes_back_is_current_while_its_old_version_drains(observed: Observed) -> None:
    """A, B, A again: `name@A` names the current version, not the one that is draining."""
    observed.publish(A)
    first = observed.acquire("first")
    observed.publish(B)
    second = observed.publish(A)
    assert observed.acquire("exact", A) is second
    assert observed.acquire("plain") is second
    observed.release(first, "first")
    assert observed.idle[-1] is first
    assert A in digests(observed.registry), "what `idle` may free is asked again"


# -- publish ---------------------------------------------------------------------------------------------------------


def check(observed: Observed, digest: AdapterDigest, *, replace: bool = False, expected: str | None = None) -> bool:
    return observed.registry.check_publish(NAME, digest, replace=replace, expected_digest=expected)


def test_the_rules_of_publishing(observed: Observed) -> None:
    assert check(observed, A)
    assert check(observed, A, expected=""), "expecting that there is none"
    with pytest.raises(AdapterConflict):
        check(observed, A, expected=B)
    observed.publish(A)
    assert not check(observed, A)
    assert not check(observed, A, expected=B), "the content is there already: nothing to conflict with"
    with pytest.raises(AdapterExists) as exists:
        check(observed, B)
    assert exists.value.metadata["digest"].startswith("a")
    assert check(observed, B, replace=True)
    assert check(observed, B, replace=True, expected=A)
    for expected in (B, ""):
        with pytest.raises(AdapterConflict) as conflict:
            check(observed, B, replace=True, expected=expected)
        assert conflict.value.reason == "VERSION_CONFLICT"


def test_an_id_that_is_being_removed_takes_no_content(observed: Observed) -> None:
    observed.publish(A)
    observed.registry.drain(NAME, None)
    for digest in (A, B):
        with pytest.raises(AdapterConflict) as conflict:
            check(observed, digest, replace=True)
        assert conflict.value.reason == "ADAPTER_UNREGISTERED"


def test_content_that_failed_can_be_published_again(observed: Observed) -> None:
    broken = observed.publish(A)
    observed.registry.fail(A, "BLOB_CORRUPT")
    assert check(observed, A)
    observed.publish(A)
    assert observed.acquire("r").state is AdapterState.ACTIVE
    assert observed.idle == [broken]


def test_content_that_is_quarantined_cannot(observed: Observed) -> None:
    observed.publish(A)
    observed.registry.quarantine(A, "ADAPTER_NON_FINITE")
    with pytest.raises(AdapterUnusable):
        check(observed, A, replace=True)
    assert check(observed, B, replace=True)


def test_a_new_id_is_loading_until_it_is_published_or_given_up(observed: Observed) -> None:
    with observed.registry.loading(NAME):
        error = observed.refusal()
        assert (error.reason, error.retry_after_s) == ("ADAPTER_NOT_READY", 1.0)
        assert digests(observed.registry) == frozenset()
    assert isinstance(observed.refusal(), AdapterNotFound)
    with observed.registry.loading(NAME):
        observed.publish(A)
    assert observed.acquire("r").digest == A
    assert observed.changes == [(Change.ADDED, "a")]


def test_beginning_on_a_taken_id_leaves_it_in_service(observed: Observed) -> None:
    observed.publish(A)
    with observed.registry.loading(NAME):
        assert observed.acquire("r").digest == A
    assert observed.acquire("s").digest == A


# -- drain and remove ------------------------------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_only_one_caller_gets_it(observed: Observed) -> None:
    observed.publish(A)
    observed.acquire("old")
    observed.publish(B)
    observed.acquire("current")
    versions = observed.registry.drain(NAME, None)
    assert [version.digest for version in versions] == [B, A]
    assert observed.refusal().reason == "ADAPTER_DRAINING"
    with pytest.raises(AdapterNotFound):
        observed.registry.drain(NAME, None)
    for version, request_id in zip(versions, ["current", "old"], strict=True):
        observed.release(version, request_id)
    observed.remove(NAME)
    assert isinstance(observed.refusal(), AdapterNotFound)
    assert len(observed.registry) == 0
    assert digests(observed.registry) == frozenset()
    assert observed.changes[-1] == (Change.REMOVED, "b")


def test_drain_compares_the_expected_digest_first(observed: Observed) -> None:
    observed.publish(A)
    with pytest.raises(AdapterConflict):
        observed.registry.drain(NAME, B)
    assert observed.acquire("r").digest == A
    assert observed.registry.drain(NAME, A)


def test_removing_a_held_version_is_a_bug(observed: Observed) -> None:
    observed.publish(A)
    observed.acquire("r")
    observed.registry.drain(NAME, None)
    with pytest.raises(AssertionError):
        observed.remove(NAME)


@pytest.mark.parametrize("state", ["active", "failed", "quarantined"])
def test_an_unregistering_that_failed_leaves_everything_as_it_was(observed: Observed, state: str) -> None:
    """A quarantined adapter does not come back into service because a disk was full."""
    version = observed.publish(A)
    if state == "failed":
        observed.registry.fail(A, "BLOB_CORRUPT")
    if state == "quarantined":
        observed.registry.quarantine(A, "ADAPTER_NON_FINITE")
    before = (version.state, version.state_reason)
    observed.registry.drain(NAME, None)
    observed.registry.revive(NAME)
    assert (version.state, version.state_reason) == before
    assert observed.registry.drain(NAME, None) == [version]


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_quarantine_is_of_content_and_spares_requests_inside(observed: Observed) -> None:
    version, twin = observed.publish(A), observed.publish(A, OTHER)
    assert observed.acquire("1") is version
    assert observed.registry.quarantine(A, "ADAPTER_NON_FINITE") == [version, twin]
    assert observed.registry.quarantine(A, "ADAPTER_NON_FINITE") == [], "it is out of service already"
    error = observed.refusal()
    assert (type(error), error.reason) == (AdapterUnusable, "ADAPTER_QUARANTINED")
    assert "LiftQuarantine" in error.message
    assert version.leases == {"1"}, "those that run go on"


def test_a_quarantine_of_content_that_is_leaving_changes_nothing(observed: Observed) -> None:
    old = observed.publish(A)
    observed.acquire("r")
    observed.publish(B)
    assert observed.registry.quarantine(A, "ADAPTER_NON_FINITE") == []
    assert old.state is AdapterState.DRAINING
    assert observed.acquire("s").digest == B


def test_lost_files_fail_every_id_with_that_content(observed: Observed) -> None:
    observed.publish(A)
    twin = observed.publish(A, OTHER)
    observed.registry.fail(A, "BLOB_CORRUPT")
    assert isinstance(observed.refusal(), DataLoss)
    assert twin.state is AdapterState.FAILED
    observed.publish(B)
    observed.registry.fail(B, "OTHER_REASON")
    assert observed.refusal().reason == "ADAPTER_NOT_READY"


# -- watching --------------------------------------------------------------------------------------------------------


def test_watchers_are_told_of_every_change_once(observed: Observed) -> None:
    version = observed.publish(A)
    observed.publish(B)
    observed.registry.pin(version, True)
    observed.registry.pin(version, True)
    observed.registry.drain(NAME, None)
    observed.registry.revive(NAME)
    observed.registry.drain(NAME, None)
    observed.remove(NAME)
    updated = Change.UPDATED
    assert observed.changes == [
        (Change.ADDED, "a"),
        *[(updated, letter) for letter in "babbb"],
        (Change.REMOVED, "b"),
    ]


def test_current_versions_come_in_the_order_of_ids(observed: Observed) -> None:
    for name in ("z", "a", "m"):
        observed.publish(A, AdapterId(name))
    assert [version.adapter_id for version in observed.registry] == ["a", "m", "z"]
    assert {version.adapter_id for version in observed.registry.of(A)} == {"a", "m", "z"}


# -- any order -------------------------------------------------------------------------------------------------------


class RegistryMachine(RuleBasedStateMachine):
    """Against the obvious model: the current versions, and the requests that hold each."""

    names = st.sampled_from([NAME, OTHER])
    digests = st.sampled_from([A, B, C])

    def __init__(self) -> None:
        super().__init__()
        self.idle: list[Version] = []
        self.registry = Registry()
        self.current: dict[AdapterId, Version] = {}
        self.held: dict[str, Version] = {}
        self.drained: set[AdapterId] = set()
        self.number = 0

    @rule(name=names, digest=digests, replace=st.booleans())
    def publish(self, name: AdapterId, digest: AdapterDigest, replace: bool) -> None:
        old = self.current.get(name)
        try:
            changes = self.registry.check_publish(name, digest, replace=replace, expected_digest=None)
        except AdapterConflict:
            assert name in self.drained
            return
        except AdapterExists:
            assert old is not None
            assert not replace
            assert old.digest != digest
            return
        assert changes == (old is None or old.digest != digest)
        if changes:
            version = Version(adapter_id=name, digest=digest, info=AdapterInfo(), create_time_s=0.0)
            assert self.registry.publish(version) is old
            if old is not None and not old.leases:
                self.idle.append(old)
            self.current[name] = version

    @rule(name=names, digest=st.one_of(st.none(), digests))
    def acquire(self, name: AdapterId, digest: AdapterDigest | None) -> None:
        self.number += 1
        current = self.current.get(name)
        usable = current is not None and name not in self.drained and digest in (None, current.digest)
        try:
            version = self.registry.require_active(AdapterReference(name, digest))
        except (AdapterNotFound, AdapterUnusable):
            assert not usable
            return
        assert usable
        assert version is current
        self.registry.hold(version, str(self.number))
        self.held[str(self.number)] = version

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.held)))
        version = self.held.pop(request_id)
        if self.registry.release(version, request_id):
            self.idle.append(version)
        last = version not in self.held.values()
        was_replaced = self.current.get(version.adapter_id) is not version
        assert (version in self.idle) == (last and was_replaced)

    @rule(name=names)
    def drain(self, name: AdapterId) -> None:
        try:
            versions = self.registry.drain(name, None)
        except AdapterNotFound:
            assert name in self.drained or name not in self.current
            return
        self.drained.add(name)
        wanted = {id(v) for v in self.held.values() if v.adapter_id == name} | {id(self.current[name])}
        assert {id(version) for version in versions} == wanted

    @precondition(lambda self: self.drained)
    @rule(data=st.data(), revive=st.booleans())
    def end_drain(self, data: st.DataObject, revive: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.drained)))
        if revive:
            self.registry.revive(name)
        elif any(version.adapter_id == name for version in self.held.values()):
            return
        else:
            self.registry.remove(self.current[name])
            del self.current[name]
        self.drained.discard(name)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        assert {version.adapter_id: version for version in self.registry} == self.current
        alive = {id(version): version for version in [*self.current.values(), *self.held.values()]}
        assert digests(self.registry) == {version.digest for version in alive.values()}
        for digest in (A, B, C):
            assert {id(v) for v in self.registry.of(digest)} == {
                key for key, version in alive.items() if version.digest == digest
            }
        leases: dict[int, set[str]] = {}
        for request_id, version in self.held.items():
            leases.setdefault(id(version), set()).add(request_id)
        assert all(version.leases == leases.get(key, set()) for key, version in alive.items())
        assert len({id(version) for version in self.idle}) == len(self.idle), "idle is said once"


TestRegistryMachine: Any = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)
