"""Local sources: rows 30, 32, 33, 68 and 69 of the table of bad inputs, and that ids and names never become paths."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weft import durable
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.store import AdapterStore
from weft.adapters.versions import FileDigest, digest_of
from weft.config import AdapterLimits
from weft.errors import AdapterUnusable, Code, InvalidRequest, WeftError
from weft.v1.adapter_files import PEFT_FILES

CONFIG, WEIGHTS = PEFT_FILES
LIMITS = AdapterLimits(file_bytes_max=100_000, config_bytes_max=1000)
CONTENT = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: b"weights " * 20}
GENERATION = digest_of(FileDigest(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in CONTENT.items())


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="weft-sources-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def store(root: Path) -> AdapterStore:
    opened = AdapterStore(root, LIMITS)
    opened.recover()
    return opened


@pytest.fixture
def source(root: Path) -> Path:
    directory = root / "demo" / "upper"
    directory.mkdir(parents=True)
    for name, data in CONTENT.items():
        (directory / name).write_bytes(data)
    (directory / "README.md").write_text("not part of the adapter")
    (directory / "adapter_model.bin").write_bytes(b"never read")
    return directory


def copied(store: AdapterStore, source: str) -> AdapterDigest:
    with store.stage_copy(source) as staging:
        return staging.seal().digest


def copy_refused(store: AdapterStore, root: Path, source: str) -> WeftError:
    with pytest.raises(WeftError) as caught:
        store.stage_copy(source)
    assert os.listdir(root / "staging") == [], "nothing is left"
    assert str(root) not in caught.value.message + str(caught.value.metadata), "no server path is told"
    return caught.value


@pytest.mark.usefixtures("source")
def test_a_directory_below_the_root_is_copied(store: AdapterStore) -> None:
    for spelling in ("demo/upper", "demo/upper/"):
        with store.stage_copy(spelling) as staging:
            manifest = store.commit(staging.seal(), adapter_id=AdapterId("alpha"), method="lora", source=spelling)
    assert manifest.digest == GENERATION
    with store.open_version(manifest.digest) as version:
        assert {name: file.read() for name, file in version.files.items()} == CONTENT


def test_an_absolute_directory_must_be_allowed(store: AdapterStore, root: Path, source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "models" / "team a" / "upper"
    shutil.copytree(source, outside)
    assert copy_refused(store, root, str(outside)).reason == "SOURCE_INVALID"
    opened = AdapterStore(root, LIMITS, allowed_sources=[tmp_path / "other", tmp_path / "models"])
    assert copied(opened, str(outside)) == GENERATION
    for escape in (f"{tmp_path}/models/../models/team a/upper", f"{tmp_path}/models2", str(tmp_path), "/", "//"):
        assert copy_refused(opened, root, escape).reason == "SOURCE_INVALID"
    (tmp_path / "models" / "link").symlink_to(outside)
    assert copy_refused(opened, root, f"{tmp_path}/models/link").reason == "SOURCE_NOT_REGULAR"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "path",
    [
        *["", "/", ".", "..", "../demo/upper", "demo/../demo/upper", "demo//upper", "./demo/upper", "demo/upper/.."],
        *["demo\\upper", "C:\\demo", "demo/upper\0", "demo/\nupper", "demo/\u202eupper", "\ud800", "x" * 1025],
        *["é" * 200, "catalog", "versions", "versions/" + "0" * 64, "staging", "staging/x", "/etc", "/etc/../etc"],
    ],
)
def test_a_path_that_is_not_plain_is_refused(store: AdapterStore, root: Path, path: str) -> None:
    error = copy_refused(store, root, path)
    assert (error.code, error.reason, error.field) == (Code.INVALID_ARGUMENT, "SOURCE_INVALID", "source")
    assert error.message.isprintable()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a", "SOURCE_DISABLED"),
        ("s3://bucket/a", "SOURCE_DISABLED"),
        ("hf://team/a", "SOURCE_DISABLED"),
        ("HTTPS://example.com/a@b", "SOURCE_DISABLED"),
        ("gs:bucket", "SOURCE_DISABLED"),
        ("file:///etc/passwd", "SOURCE_SCHEME"),
        ("FILE:/etc/passwd", "SOURCE_SCHEME"),
        ("http://169.254.169.254/", "SOURCE_SCHEME"),
        ("ftp://example.com/a", "SOURCE_SCHEME"),
        ("data:application/json,{}", "SOURCE_SCHEME"),
        ("https://user:hunter2@example.com/a", "SOURCE_SCHEME"),
        ("https://hunter2@example.com", "SOURCE_SCHEME"),
    ],
)
def test_urls_are_never_fetched_nor_repeated(store: AdapterStore, root: Path, url: str, reason: str) -> None:
    error = copy_refused(store, root, url)
    assert error.reason == reason
    assert error.code == (Code.FAILED_PRECONDITION if reason == "SOURCE_DISABLED" else Code.INVALID_ARGUMENT)
    assert isinstance(error, AdapterUnusable if reason == "SOURCE_DISABLED" else InvalidRequest)
    for secret in ("hunter2", "example", "passwd", "bucket"):
        assert secret not in error.message + str(error.metadata)


def replaced_by(path: Path, kind: str, elsewhere: Path) -> None:
    data = path.read_bytes()
    if kind == "hard link":
        os.link(path, elsewhere)
        return
    path.unlink()
    match kind:
        case "symlink":
            elsewhere.write_bytes(data)
            path.symlink_to(elsewhere)
        case "dangling symlink":
            path.symlink_to(elsewhere)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                os.chdir(path.parent)
                bound.bind(path.name)
        case "device":
            path.symlink_to("/dev/zero")
            with contextlib.suppress(PermissionError):
                path.unlink()
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))
        case "huge sparse file":
            with path.open("wb") as file:
                file.truncate(1 << 40)


@pytest.mark.parametrize("name", PEFT_FILES)
@pytest.mark.parametrize(
    "kind",
    ["symlink", "dangling symlink", "hard link", "directory", "fifo", "socket", "device", "huge sparse file"],
)
def test_only_regular_files_are_copied(
    store: AdapterStore, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced_by(source / name, kind, root / "elsewhere")
    error = copy_refused(store, root, "demo/upper")
    assert error.code is Code.INVALID_ARGUMENT
    if kind == "huge sparse file":
        assert error.reason == ("CONFIG_INVALID" if name == CONFIG else "ADAPTER_TOO_LARGE")
        assert f"given {1 << 40}" in error.message
    else:
        assert error.reason == "SOURCE_NOT_REGULAR"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_not_even_opened(
    store: AdapterStore, root: Path, source: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Opening a device or a FIFO can act or wait."""
    replaced_by(source / CONFIG, kind, root / "elsewhere")
    opened: list[object] = []
    real = os.open

    def recorded(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", recorded)
    assert copy_refused(store, root, "demo/upper").reason == "SOURCE_NOT_REGULAR"
    assert "upper" in opened
    assert CONFIG not in opened


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "socket"])
def test_a_name_exchanged_between_the_look_and_the_opening(
    store: AdapterStore, root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    real = os.stat

    def look_and_exchange(path: str, **options: object) -> os.stat_result:
        found = real(path, **options)  # pyright: ignore[reportArgumentType]
        if path == CONFIG and (source / CONFIG).is_file() and not (source / CONFIG).is_symlink():
            monkeypatch.setattr(os, "stat", real)
            replaced_by(source / CONFIG, kind, root / "elsewhere")
        return found

    monkeypatch.setattr(os, "stat", look_and_exchange)
    assert copy_refused(store, root, "demo/upper").reason == "SOURCE_NOT_REGULAR"


@pytest.mark.parametrize("kind", ["symlink", "file", "fifo"])
@pytest.mark.parametrize("component", ["demo", "upper"])
def test_only_real_directories_are_walked(
    store: AdapterStore, root: Path, source: Path, kind: str, component: str
) -> None:
    path = root / "demo" if component == "demo" else source
    path.rename(root / "moved")
    if kind == "symlink":
        path.symlink_to(root / "moved")
    elif kind == "file":
        path.write_bytes(b"")
    else:
        os.mkfifo(path)
    assert copy_refused(store, root, "demo/upper").reason == "SOURCE_NOT_REGULAR"


def test_what_is_missing_is_named(store: AdapterStore, root: Path, source: Path) -> None:
    assert copy_refused(store, root, "demo/nothing").reason == "SOURCE_NOT_FOUND"
    (source / WEIGHTS).unlink()
    pickled = copy_refused(store, root, "demo/upper")
    assert pickled.reason == "FORMAT_UNSUPPORTED"
    assert "safetensors only; a pickle is refused" in pickled.message
    assert "given adapter_model.bin" in pickled.message
    (source / "adapter_model.bin").unlink()
    assert copy_refused(store, root, "demo/upper").reason == "SOURCE_NOT_FOUND"
    (source / CONFIG).unlink()
    missing = copy_refused(store, root, "demo/upper")
    assert missing.reason == "SOURCE_NOT_FOUND"
    assert CONFIG in missing.message


@pytest.mark.parametrize("change", ["append", "truncate", "overwrite", "exchange"])
def test_a_source_that_changes_while_it_is_copied(
    store: AdapterStore, root: Path, source: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path, real = source / WEIGHTS, durable.write_all

    def write_and_change(fd: int, data: bytes) -> None:
        real(fd, data)
        if data == CONTENT[WEIGHTS]:
            match change:
                case "append":
                    with path.open("ab") as file:
                        file.write(b"more")
                case "truncate":
                    os.truncate(path, 3)
                case "overwrite":
                    path.write_bytes(CONTENT[WEIGHTS][::-1])
                case "exchange":
                    other = root / "other"
                    other.write_bytes(CONTENT[WEIGHTS][::-1])
                    other.replace(path)

    monkeypatch.setattr(durable, "write_all", write_and_change)
    error = copy_refused(store, root, "demo/upper")
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "CHECKSUM_MISMATCH")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=70) | st.from_regex(r"(\.\./|/|\\|%2e|[a-z0-9]){1,8}", fullmatch=True))
@example(text="/etc/passwd")
@example(text="../versions")
def test_no_text_opens_anything_outside_of_the_root(store: AdapterStore, root: Path, text: str) -> None:
    opened: list[str] = []
    here = threading.get_ident()  # servers of other tests may open their own files meanwhile
    real = {name: getattr(os, name) for name in ("open", "unlink", "rename", "mkdir", "rmdir", "scandir")}

    def recorded(name: str) -> Callable[..., object]:
        def call(path: object, *arguments: object, **options: object) -> object:
            if threading.get_ident() != here:
                return real[name](path, *arguments, **options)
            if not options.get("dir_fd"):
                opened.extend(str(p) for p in (path, *arguments[:1]) if isinstance(p, str | Path))
            else:
                assert isinstance(path, str)
                assert path not in {".", ".."}
                assert "/" not in path
            return real[name](path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, recorded(name))
        for door in (
            lambda: store.read_manifest(AdapterId(text)),
            lambda: store.remove(AdapterId(text)),
            lambda: store.open_version(AdapterDigest(text)),
            lambda: store.stage_copy(text),
        ):
            with contextlib.suppress(WeftError):
                door()
    assert all(os.path.realpath(path).startswith(str(root)) for path in opened)
