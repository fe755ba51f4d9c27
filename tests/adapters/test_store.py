"""The adapter store: what it keeps, what it refuses (rows 9, 10, 93), and how it recovers."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft import durable
from weft.adapters.catalog import MANIFEST_BYTES_MAX, Manifest, ManifestFault, decode
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.store import AdapterStore
from weft.adapters.versions import FileDigest, StagedVersion, digest_of
from weft.config import AdapterLimits
from weft.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    Code,
    DataLoss,
    InvalidAdapter,
    InvalidRequest,
    Unavailable,
)
from weft.v1.adapter_files import PEFT_FILES

CONFIG, WEIGHTS = PEFT_FILES
LIMITS = AdapterLimits(file_bytes_max=100_000, config_bytes_max=1000)
ID, OTHER = AdapterId("alpha"), AdapterId("beta")
ABSENT = AdapterDigest("0" * 64)


@pytest.fixture
def root() -> Iterator[Path]:
    """Yield a directory in memory if possible: an fsync there is free, and no test here is about the disk."""
    directory = Path(tempfile.mkdtemp(prefix="weft-store-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def store(root: Path) -> AdapterStore:
    opened = AdapterStore(root, LIMITS, lock_timeout_s=10.0)
    assert opened.recover() == ({}, (), 0)
    return opened


def content(seed: int) -> dict[str, bytes]:
    return {CONFIG: json.dumps({"seed": seed}).encode(), WEIGHTS: f"weights of {seed} ".encode() * 20}


def digest(seed: int) -> AdapterDigest:
    return digest_of(
        FileDigest(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content(seed).items()
    )


@contextlib.contextmanager
def staged(store: AdapterStore, seed: int) -> Iterator[StagedVersion]:
    with store.stage() as staging:
        for name, data in content(seed).items():
            with staging.open_file(name) as file:
                for at in range(0, len(data), 100):
                    file.write(data[at : at + 100])
        yield staging.seal()


def commit(store: AdapterStore, adapter_id: str, seed: int, **options: object) -> Manifest:
    with staged(store, seed) as version:
        return store.commit(version, adapter_id=AdapterId(adapter_id), method="lora", **options)  # pyright: ignore[reportArgumentType]


def stored(store: AdapterStore, digest: AdapterDigest) -> dict[str, bytes]:
    with store.open_version(digest) as version:
        return {name: file.read() for name, file in version.files.items()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in (".lock", ".changes"))


# The digest


def test_the_digest_is_a_published_constant() -> None:
    files = [FileDigest(name, 5, hashlib.sha256(b"bytes").hexdigest()) for name in (WEIGHTS, CONFIG)]
    expected = "2f0f7d85fafb9ac462042eda977b2855a180e6881373a09e3735d1fffcddcd8c"
    assert digest_of(files) == digest_of(reversed(files)) == expected


def test_the_readme_computes_the_same_digest(store: AdapterStore, root: Path) -> None:
    readme = Path(__file__).parents[2] / "adapters_store" / "README.md"
    recipe = re.search(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert recipe is not None
    scope: dict[str, Callable[[Path], str]] = {}
    exec(recipe.group(1), scope)  # the documentation is what is tested
    for seed in range(3):
        manifest = commit(store, f"a{seed}", seed)
        directory = root / "versions" / manifest.digest
        assert scope["digest_of_directory"](directory) == directory.name == digest(seed)


@given(st.dictionaries(st.sampled_from(["a.b", "a.bc", "b.b"]), st.binary(max_size=3), min_size=1))
def test_no_two_contents_share_a_digest(files: dict[str, bytes]) -> None:
    def digest(files: dict[str, bytes]) -> AdapterDigest:
        return digest_of(FileDigest(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items())

    mine = digest(files)
    for name, data in files.items():
        for changed in ({name: data + b"\0"}, {name: b"x" + data}, {name + "x": data}):
            assert digest({**{n: d for n, d in files.items() if n != name}, **changed}) != mine
        assert digest(files | {"z.z": b""}) != mine


# The ordinary life


def test_what_was_committed_is_read_back(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1, pinned=True, source="demo/alpha")
    assert manifest.digest == digest(1)
    assert manifest.size_bytes == sum(map(len, content(1).values()))
    assert (manifest.method, manifest.pinned, manifest.source) == ("lora", True, "demo/alpha")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", manifest.create_time)
    assert store.read_manifest(ID) == manifest
    assert store.read_catalog() == ({ID: manifest}, ())
    assert stored(store, manifest.digest) == content(1)
    assert AdapterStore(root, LIMITS).recover() == ({ID: manifest}, (), 0)
    assert names(root / "staging") == []
    assert json.loads((root / "catalog" / "alpha.json").read_text())["format"] == 3


def test_files_are_private_and_positioned_at_their_start(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    with store.open_version(manifest.digest) as version:
        assert version.size_bytes == manifest.size_bytes
        assert all(file.tell() == 0 for file in version.files.values())
    for path in [*root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_id_is_changed_only_by_who_says_so(store: AdapterStore) -> None:
    first = commit(store, "alpha", 1, pinned=True)
    with pytest.raises(AdapterExists) as taken:
        commit(store, "alpha", 2)
    assert (taken.value.code, taken.value.reason) == (Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
    assert first.digest in taken.value.message
    assert taken.value.metadata["adapter_id"] == "alpha"
    with pytest.raises(AdapterConflict) as conflict:
        commit(store, "alpha", 2, expected_digest=ABSENT)
    assert (conflict.value.code, conflict.value.reason) == (Code.ABORTED, "VERSION_CONFLICT")
    with pytest.raises(AdapterConflict, match="is none"):
        commit(store, "beta", 2, expected_digest=first.digest, replace=True)
    assert store.read_catalog().manifests == {ID: first}
    with pytest.raises(AdapterNotFound):
        store.open_version(digest(2))

    assert commit(store, "alpha", 1) == first, "the same content again changes nothing, not even the pin"
    second = commit(store, "alpha", 2, expected_digest=first.digest)
    third = commit(store, "alpha", 3, replace=True)
    assert [second.digest, third.digest] == [digest(2), digest(3)]
    unpinned = commit(store, "alpha", 3, replace=True, pinned=False)
    assert store.read_manifest(ID) == unpinned


def test_content_is_kept_once_and_collected_when_nobody_names_it(store: AdapterStore, root: Path) -> None:
    for adapter_id, seed in [("alpha", 1), ("beta", 1), ("gamma", 2), ("delta", 3)]:
        commit(store, adapter_id, seed)
    assert len(names(root / "versions")) == 3
    assert store.collect(digest(1), digest(2), digest(3)) == ()
    store.remove(ID)
    store.remove(AdapterId("gamma"))
    store.remove(AdapterId("delta"))
    assert store.collect(digest(1), digest(3)) == (digest(3),)
    assert store.collect(digest(3), ABSENT) == ()
    assert names(root / "versions") == sorted([digest(1), digest(2)])
    store.remove(OTHER)
    assert set(store.collect(digest(1), digest(2))) == {digest(1), digest(2)}
    assert names(root / "versions") == names(root / "staging") == names(root / "catalog") == []


def test_an_open_version_is_not_collected_and_stays_readable(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    with store.open_version(manifest.digest) as version:
        store.remove(ID)
        assert store.collect(manifest.digest) == ()
        assert AdapterStore(root, LIMITS).recover().num_orphans_removed == 0
        assert version.files[CONFIG].read() == content(1)[CONFIG]
    assert store.collect() == (manifest.digest,), "the next collection tries again"


def test_removing_twice_is_not_found(store: AdapterStore) -> None:
    manifest = commit(store, "alpha", 1)
    with pytest.raises(AdapterConflict):
        store.remove(ID, expected_digest=ABSENT)
    store.remove(ID, expected_digest=manifest.digest)
    for call in (store.remove, store.read_manifest, lambda i: store.set_pinned(i, True)):
        with pytest.raises(AdapterNotFound) as caught:
            call(ID)
        assert caught.value.reason == "ADAPTER_NOT_FOUND"


def test_pinning_changes_the_pin_alone(store: AdapterStore) -> None:
    manifest = commit(store, "alpha", 1, source="demo/alpha")
    pinned = store.set_pinned(ID, True)
    assert pinned.pinned
    assert store.read_manifest(ID) == pinned
    assert store.set_pinned(ID, False) == manifest


def test_32_concurrent_removals_succeed_once(store: AdapterStore) -> None:
    commit(store, "alpha", 1)
    results: list[str] = []

    def remove() -> None:
        try:
            store.remove(ID)
        except AdapterNotFound as error:
            results.append(error.reason)
        else:
            results.append("removed")

    threads = [threading.Thread(target=remove) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["ADAPTER_NOT_FOUND"] * 31 + ["removed"]


# Limits and misuse


@pytest.mark.parametrize(
    ("name", "limit", "reason"), [(CONFIG, 1000, "CONFIG_INVALID"), (WEIGHTS, 100_000, "ADAPTER_TOO_LARGE")]
)
def test_a_file_ends_at_its_limit(store: AdapterStore, root: Path, name: str, limit: int, reason: str) -> None:
    with store.stage() as staging:
        with staging.open_file(name) as file:
            file.write(b"x" * limit)
            with pytest.raises(InvalidAdapter, match=f"limit {limit}\\), given {limit + 1}") as caught:
                file.write(b"x")
        assert (caught.value.reason, caught.value.field) == (reason, name)
        assert file.digest == (name, limit, hashlib.sha256(b"x" * limit).hexdigest())
    with store.stage() as staging, pytest.raises(InvalidAdapter, match="limit 10"), staging.open_file(name, 10) as file:
        file.write(b"x" * 11)
    assert names(root / "staging") == []


@pytest.mark.parametrize("name", ["", "a", "../a.b", "a/b.c", "/a.b", ".lock", "a.b.c", "A.b", "a b.c", "a.b\n", "é.b"])
def test_only_plain_names_are_staged(store: AdapterStore, name: str) -> None:
    with store.stage() as staging, pytest.raises(ValueError, match="no file named"):
        staging.open_file(name)


def test_other_files_can_be_versions_too(store: AdapterStore) -> None:
    with store.stage() as staging:
        for name in ("mixture.json", "router.safetensors", CONFIG):
            with staging.open_file(name) as file:
                file.write(name.encode())
        version = staging.seal()
        assert [file.name for file in version.files] == sorted(["mixture.json", "router.safetensors", CONFIG])
        with version.open("mixture.json") as opened:
            assert opened.read() == b"mixture.json"
        store.commit(version, adapter_id=ID, method="mixture")
    assert set(stored(store, version.digest)) == {"mixture.json", "router.safetensors", CONFIG}


def test_an_unfinished_file_is_not_sealed(store: AdapterStore, root: Path) -> None:
    with store.stage() as staging:
        with pytest.raises(ValueError, match="closed"):
            staging.seal()
        file = staging.open_file(CONFIG)
        file.write(b"{}")
        with pytest.raises(ValueError, match="closed"):
            staging.seal()
        file.close()
        staging.seal()
    assert names(root / "staging") == []


@pytest.mark.parametrize("bad", ["../x", "a/b/c", "/b", "a/", "A", "", "base", "x" * 64, "a\0"])
def test_ids_and_digests_are_checked_at_every_door(store: AdapterStore, bad: str) -> None:
    doors: list[Callable[[], object]] = [
        lambda: store.read_manifest(AdapterId(bad)),
        lambda: store.remove(AdapterId(bad)),
        lambda: store.set_pinned(AdapterId(bad), True),
        lambda: store.open_version(AdapterDigest(bad)),
        lambda: commit(store, bad, 1),
    ]
    for door in doors:
        with pytest.raises(InvalidRequest):
            door()


# Bit rot


def test_every_flipped_bit_of_a_version_is_seen(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    healthy = commit(store, "beta", 2)
    for name, data in content(1).items():
        path = root / "versions" / manifest.digest / name
        for at in range(0, len(data), 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at % 8)
            path.write_bytes(flipped)
            with pytest.raises(DataLoss) as caught:
                store.open_version(manifest.digest)
            assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
            assert str(root) not in caught.value.message
        path.write_bytes(data)
    assert stored(store, manifest.digest) == content(1)
    assert stored(store, healthy.digest) == content(2)


def test_every_flipped_bit_of_a_manifest_is_seen(store: AdapterStore) -> None:
    manifest = commit(store, "alpha", 1, pinned=True, source="demo/alpha")
    data = manifest.encode()
    assert decode(data, ID) == manifest
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ManifestFault):
            decode(bytes(flipped), ID)
    for torn in range(len(data)):
        with pytest.raises(ManifestFault):
            decode(data[:torn], ID)
    with pytest.raises(ManifestFault, match="another adapter id"):
        decode(data, OTHER)
    for other in (data + b"\n", data.replace(b"  ", b" "), b"x" * (MANIFEST_BYTES_MAX + 1), b"[]", b"null", b"{}"):
        with pytest.raises(ManifestFault):
            decode(other, ID)


@pytest.mark.parametrize("manifest_format", [1, 2])
def test_a_manifest_of_an_older_format_is_read(store: AdapterStore, root: Path, manifest_format: int) -> None:
    """The next change of the id writes the manifest as it is spelled now. Format 1 spelled the digest `generation`."""
    manifest = commit(store, "alpha", 1)
    path = root / "catalog" / f"{ID}.json"
    path.write_bytes(manifest.encode(manifest_format))
    assert (b'"generation"' in path.read_bytes()) == (manifest_format == 1)
    assert b'"quarantined"' not in path.read_bytes()
    assert decode(path.read_bytes(), ID) == manifest
    as_newer = path.read_bytes().replace(f'"format": {manifest_format}'.encode(), b'"format": 3')
    with pytest.raises(ManifestFault, match="has no proper"):
        decode(as_newer, ID)
    as_older = path.read_bytes().replace(
        f'"format": {manifest_format}'.encode(), f'"format": {3 - manifest_format}'.encode()
    )
    with pytest.raises(ManifestFault, match="checksum"):
        decode(
            as_older.replace(b'"generation"', b'"digest"')
            if manifest_format == 1
            else as_older.replace(b'"digest"', b'"generation"'),
            ID,
        )
    replaced = commit(store, "alpha", 2, replace=True)
    assert path.read_bytes() == replaced.encode()


def test_a_manifest_describes_its_content(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1, info='{"rank": 8}', checked_for="a base and limits")
    assert (manifest.info, manifest.checked_for) == ('{"rank": 8}', "a base and limits")
    assert AdapterStore(root, LIMITS).recover().manifests == {ID: manifest}


def test_a_quarantine_lasts_until_other_content(store: AdapterStore, root: Path) -> None:
    """It is of an id with one digest, and durable; the same content again does not end it."""
    manifest = commit(store, "alpha", 1)
    commit(store, "beta", 1)
    assert store.set_quarantined(ID, digest(2), "NON_FINITE") == manifest, "the id has other content by now"
    quarantined = store.set_quarantined(ID, digest(1), "NON_FINITE")
    assert quarantined == dataclasses.replace(manifest, quarantined="NON_FINITE")
    assert store.set_quarantined(ID, digest(1), "NON_FINITE") == quarantined
    assert AdapterStore(root, LIMITS).recover().manifests[ID] == quarantined
    assert store.read_manifest(OTHER).quarantined == ""
    assert commit(store, "alpha", 1) == quarantined
    assert commit(store, "alpha", 1, replace=True).quarantined == "NON_FINITE"
    assert commit(store, "alpha", 1, expected_digest=digest(1)).quarantined == "NON_FINITE"
    assert store.set_pinned(ID, True).quarantined == "NON_FINITE"
    assert store.set_quarantined(ID, digest(1), "").quarantined == ""
    store.set_quarantined(ID, digest(1), "NON_FINITE")
    assert commit(store, "alpha", 2, replace=True).quarantined == ""
    with pytest.raises(AdapterNotFound):
        store.set_quarantined(AdapterId("gamma"), digest(1), "NON_FINITE")


def test_a_manifest_that_could_not_be_read_back_is_not_written(store: AdapterStore) -> None:
    manifest = commit(store, "alpha", 1)
    for source in ("\ud800", "x" * MANIFEST_BYTES_MAX):
        with pytest.raises(ManifestFault):
            commit(store, "alpha", 2, replace=True, source=source)
    assert store.read_catalog() == ({ID: manifest}, ())
    with pytest.raises(AdapterNotFound):
        store.open_version(digest(2))


def rot(directory: Path, how: str) -> None:
    match how:
        case "file gone":
            (directory / WEIGHTS).unlink()
        case "file too many":
            (directory / "more.txt").write_bytes(b"x")
        case "file shorter":
            os.truncate(directory / WEIGHTS, 10)
        case "file a link":
            (directory / WEIGHTS).rename(directory.parents[1] / "moved")
            (directory / WEIGHTS).symlink_to(directory.parents[1] / "moved")
        case "all gone":
            for path in directory.iterdir():
                path.unlink()
        case "a directory in it":
            (directory / "sub").mkdir()


ROTS = ["file gone", "file too many", "file shorter", "file a link", "all gone", "a directory in it"]


@pytest.mark.parametrize("how", ROTS)
def test_a_rotten_version_is_data_loss_and_heals_by_the_same_content(store: AdapterStore, root: Path, how: str) -> None:
    manifest = commit(store, "alpha", 1)
    rot(root / "versions" / manifest.digest, how)
    with pytest.raises(DataLoss, match=manifest.digest[:12]) as caught:
        store.open_version(manifest.digest)
    assert caught.value.reason == "BLOB_CORRUPT"
    assert commit(store, "alpha", 1) == manifest
    assert stored(store, manifest.digest) == content(1)
    assert names(root / "staging") == []


def test_a_version_that_is_gone(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    shutil.rmtree(root / "versions" / manifest.digest)
    with pytest.raises(DataLoss, match="gone"):
        store.open_version(manifest.digest)
    with pytest.raises(AdapterNotFound, match="no such digest"):
        store.open_version(ABSENT)
    assert store.recover().problems[0][1:3] == (ID, "BLOB_CORRUPT")
    assert commit(store, "alpha", 1) == manifest
    assert store.recover() == ({ID: manifest}, (), 0)


def test_a_corrupt_manifest_blocks_its_id_alone(store: AdapterStore, root: Path) -> None:
    commit(store, "alpha", 1)
    healthy = commit(store, "beta", 2)
    (root / "catalog" / "alpha.json").write_bytes(b"{")
    for call in (
        lambda: store.read_manifest(ID),
        lambda: store.set_pinned(ID, True),
        lambda: commit(store, "alpha", 1),
        lambda: commit(store, "alpha", 1, expected_digest=digest(1)),
    ):
        with pytest.raises(DataLoss) as caught:
            call()
        assert caught.value.reason == "MANIFEST_CORRUPT"
    store.remove(OTHER)
    assert store.collect(digest(1), digest(2)) == (), "the unreadable manifest may name any of them"
    commit(store, "beta", 2)
    assert store.read_catalog().manifests.keys() == {healthy.adapter_id}
    assert commit(store, "alpha", 3, replace=True) == store.read_manifest(ID)
    assert store.collect(digest(1)) == (digest(1),)
    (root / "catalog" / "alpha.json").write_bytes(b"")
    store.remove(ID)
    assert store.read_catalog().manifests.keys() == {OTHER}


# Recovery


def test_a_start_with_1_percent_of_1000_corrupt(store: AdapterStore, root: Path) -> None:
    template = commit(store, "alpha", 1)
    fields = {name: getattr(template, name) for name in ("digest", "size_bytes", "method", "pinned", "create_time")}
    for index in range(999):
        manifest = Manifest(adapter_id=AdapterId(f"a{index}"), source="", **fields)
        (root / "catalog" / f"a{index}.json").write_bytes(manifest.encode())
    bad = {AdapterId(f"a{index}") for index in range(0, 999, 100)}
    for index, adapter_id in enumerate(sorted(bad)):
        path = root / "catalog" / f"{adapter_id}.json"
        data = path.read_bytes()
        match index % 4:
            case 0:
                path.write_bytes(data[: len(data) // 2])
            case 1:
                path.write_bytes(b"")
            case 2:
                path.unlink()
                path.mkdir()
            case 3:
                path.unlink()
                path.symlink_to("/etc/passwd")
    started = time.perf_counter()
    recovery = store.recover()
    assert time.perf_counter() - started < 5
    assert len(recovery.manifests) == 1000 - len(bad)
    assert {problem.adapter_id for problem in recovery.problems} == bad
    assert {problem.reason for problem in recovery.problems} == {"MANIFEST_CORRUPT"}
    assert all(str(root) not in problem.message for problem in recovery.problems)


@pytest.mark.parametrize("how", ROTS)
def test_a_start_names_versions_that_changed_size(store: AdapterStore, root: Path, how: str) -> None:
    manifest = commit(store, "alpha", 1)
    healthy = commit(store, "beta", 2)
    rot(root / "versions" / manifest.digest, how)
    recovery = store.recover()
    assert recovery.manifests.keys() == {OTHER}
    assert {(p.adapter_id, p.reason) for p in recovery.problems} == {(ID, "BLOB_CORRUPT")}
    assert stored(store, healthy.digest) == content(2)


def test_strangers_are_reported_and_left_alone(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    strangers = ["catalog/notes.txt", "catalog/UPPER.json", "catalog/base.json", "catalog/.json", "catalog/a..json"]
    strangers += ["versions/notes.txt", "versions/ABC"]
    for stranger in strangers:
        (root / stranger).write_bytes(b"x")
    (root / "versions" / ("f" * 63)).mkdir()
    recovery = store.recover()
    assert recovery.manifests == {ID: manifest}
    assert {p.path for p in recovery.problems} == {*strangers, f"versions/{'f' * 63}"}
    assert {(p.adapter_id, p.reason) for p in recovery.problems} == {(None, "UNKNOWN_FILE")}
    assert store.collect(digest(9)) == ()
    assert all((root / stranger).exists() for stranger in strangers)


def test_leftovers_go_and_living_work_stays(store: AdapterStore, root: Path) -> None:
    manifest = commit(store, "alpha", 1)
    for left_over in ("dead", ".hidden"):
        (root / "staging" / left_over).mkdir()
        (root / "staging" / left_over / WEIGHTS).write_bytes(b"x")
    for left_over in ("dead.lock", "alone.lock", "temporary.json"):
        (root / "staging" / left_over).write_bytes(b"x")
    shutil.copytree(root / "versions" / manifest.digest, root / "versions" / digest(9))
    with staged(store, 2) as version:
        alive = names(root / "staging")
        recovery = AdapterStore(root, LIMITS).recover()
        assert (recovery.num_orphans_removed, recovery.problems) == (5, ())
        assert names(root / "versions") == [manifest.digest]
        assert names(root / "staging") == [name for name in alive if version.directory.name in name]
        store.commit(version, adapter_id=OTHER, method="lora")
    assert names(root / "staging") == []
    assert stored(store, digest(2)) == content(2)


def test_a_new_store_makes_its_directories(root: Path) -> None:
    nested = root / "a" / "b"
    with pytest.raises(Unavailable):
        AdapterStore(nested, LIMITS).read_catalog()
    assert AdapterStore(nested, LIMITS).recover() == ({}, (), 0)
    assert names(nested) == ["catalog", "staging", "versions"]


# The lock


def test_one_lock_holder_at_a_time_and_patience_has_an_end(store: AdapterStore, root: Path) -> None:
    hasty = AdapterStore(root, LIMITS, lock_timeout_s=0.05)
    commit(store, "alpha", 1)
    with durable.locked(root / "catalog" / ".lock", timeout_s=1.0):
        with pytest.raises(Unavailable) as caught:
            hasty.remove(ID)
        assert (caught.value.reason, caught.value.code) == ("STORE_UNAVAILABLE", Code.UNAVAILABLE)
        assert caught.value.retry_after_s is not None
        assert stored(hasty, digest(1)) == content(1), "reading takes no lock"
        recovery = hasty.recover()
        assert recovery.manifests.keys() == {ID}
        assert [p.reason for p in recovery.problems] == ["STORE_UNAVAILABLE"]
    hasty.remove(ID)


# A model


class StoreModel(RuleBasedStateMachine):
    """The store compared with a dict, over any sequence of calls, with restarts in between."""

    adapter_ids = st.sampled_from(["a", "b", "c"])
    seeds = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="weft-model-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.store = AdapterStore(self.root, LIMITS)
        self.store.recover()
        self.bound: dict[str, int] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(adapter_id=adapter_ids, seed=seeds, replace=st.booleans())
    def register(self, adapter_id: str, seed: int, replace: bool) -> None:
        if replace or self.bound.get(adapter_id, seed) == seed:
            commit(self.store, adapter_id, seed, replace=replace)
            self.bound[adapter_id] = seed
        else:
            with pytest.raises(AdapterExists):
                commit(self.store, adapter_id, seed)

    @rule(adapter_id=adapter_ids, seed=seeds, expected=seeds)
    def swap(self, adapter_id: str, seed: int, expected: int) -> None:
        if self.bound.get(adapter_id) == expected:
            commit(self.store, adapter_id, seed, expected_digest=digest(expected))
            self.bound[adapter_id] = seed
        else:
            with pytest.raises(AdapterConflict):
                commit(self.store, adapter_id, seed, expected_digest=digest(expected))

    @rule(adapter_id=adapter_ids)
    def remove(self, adapter_id: str) -> None:
        if self.bound.pop(adapter_id, None) is None:
            with pytest.raises(AdapterNotFound):
                self.store.remove(AdapterId(adapter_id))
        else:
            self.store.remove(AdapterId(adapter_id))

    @rule(seeds=st.sets(seeds))
    def collect(self, seeds: set[int]) -> None:
        before = set(names(self.root / "versions"))
        self.store.collect(*map(digest, seeds))
        named = {digest(seed) for seed in self.bound.values()}
        assert set(names(self.root / "versions")) == before - ({digest(seed) for seed in seeds} - named)

    @precondition(lambda self: self.bound)
    @rule(data=st.data())
    def rot_and_heal(self, data: st.DataObject) -> None:
        adapter_id, seed = data.draw(st.sampled_from(sorted(self.bound.items())))
        rot(self.root / "versions" / digest(seed), data.draw(st.sampled_from(ROTS)))
        commit(self.store, adapter_id, seed)

    @rule()
    def restart(self) -> None:
        self.store = AdapterStore(self.root, LIMITS)
        assert self.store.recover().problems == ()

    @invariant()
    def agrees(self) -> None:
        manifests, problems = self.store.read_catalog()
        assert AdapterStore(self.root, LIMITS).read_catalog() == (manifests, problems)
        assert problems == ()
        assert {i: m.digest for i, m in manifests.items()} == {i: digest(s) for i, s in self.bound.items()}
        for seed in set(self.bound.values()):
            assert stored(self.store, digest(seed)) == content(seed)
        assert names(self.root / "staging") == []


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
