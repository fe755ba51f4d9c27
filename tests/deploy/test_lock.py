"""The locks of the image: every version hashed, complete, as tested; and nothing else is installed from an index."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.files import DEPLOY, ROOT, instructions

_SPEC = importlib.util.spec_from_file_location("lock", DEPLOY / "lock.py")
assert _SPEC
assert _SPEC.loader
lock = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(lock)

_ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
_LOCKS = {path.stem: path.read_text() for path in sorted((DEPLOY / "locks").iterdir())}
_PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def locked(text: str) -> dict[str, str]:
    """Return the versions of a lock by name. Raises ValueError for a line that is part of no hashed requirement."""
    body = text.removeprefix(lock._HEAD)
    if left := _ENTRY.sub("", body):
        raise ValueError(f"not a version with the sha256 of its files: {left[:80]!r}")
    return {found[1]: found[2] for found in _ENTRY.finditer(body)}


def missing(versions: dict[str, str]) -> list[str]:
    """Return what those of `versions` that are installed here require, and `versions` does not hold."""
    faults = []
    for name, version in versions.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version != version:  # a later one that nothing pins: its requirements may be others
            continue
        for needed in map(Requirement, found.requires or ()):
            held = versions.get(canonicalize_name(needed.name))
            if lock._holds(needed, "") and (held is None or not needed.specifier.contains(held)):
                faults.append(f"{name} needs {needed}, locked is {held}")
    return faults


def test_every_version_has_hashes_and_agrees_with_the_tested_ones() -> None:
    assert set(_LOCKS) == {"server", "cuda", "build"}
    pins = {canonicalize_name(name): version for name, version in _PINS.items()}
    for name, text in _LOCKS.items():
        versions = locked(text)
        assert len(versions) > 3, name
        assert {name: pins[name] for name in versions if name in pins}.items() <= versions.items(), name
    assert not set(locked(_LOCKS["server"])) & set(locked(_LOCKS["cuda"]))
    assert "torch" in locked(_LOCKS["cuda"])


def test_the_locks_are_complete() -> None:
    server, torch = locked(_LOCKS["server"]), {"torch": Version(_PINS["torch"]).public}
    direct = {canonicalize_name(Requirement(text).name) for text in lock.server_requirements()}
    assert direct <= (server | torch).keys()
    assert missing(server | torch) == []
    assert missing(locked(_LOCKS["build"])) == []
    holding = [f"x=={server['tqdm']}" for name in missing({**server, **torch, "tqdm": "0.1"}) if "tqdm" in name]
    assert holding  # negative control: a version too old
    assert missing({name: version for name, version in server.items() if name != "idna"})  # and one that is not there


def test_a_version_without_a_hash_is_seen() -> None:
    """Negative control."""
    for fault in ("idna==3.20\n", "idna==3.20 \\\n    --hash=sha256:12\n", "idna\n", "--index-url x\n"):
        with pytest.raises(ValueError, match="not a version"):
            locked(_LOCKS["server"] + fault)


def test_the_image_installs_from_indexes_by_the_locks_alone() -> None:
    commands = [
        command.strip(" ;")
        for name, argument in instructions(DEPLOY / "Dockerfile")
        if name == "RUN"
        for command in re.split(r"&&|;;|\*\)|\*/cpu\)", argument)
        if re.search(r"pip (install|wheel)", command)
    ]
    by_lock = [command for command in commands if "--no-deps --require-hashes" in command]
    assert {re.search(r"--requirement locks/(\w+)\.txt$", command)[1] for command in by_lock} == set(_LOCKS)  # type: ignore[index]
    assert [command for command in commands if command not in by_lock] == [
        '/opt/weft/bin/pip install --no-deps --constraint constraints.txt --index-url "${TORCH_INDEX_URL}" torch',
        "/opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./protos .",
        "/opt/weft/bin/pip install --no-deps wheels/*.whl",
    ]


def test_pip_refuses_what_has_another_hash(tmp_path: Path) -> None:
    """The lock is of use only if pip keeps to it: the client's wheel of another content is not installed."""
    wheel = tmp_path / "planted-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))  # an archive of no files
    (tmp_path / "lock.txt").write_text(f"planted==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--no-index", "--find-links",
         str(tmp_path), "--target", str(tmp_path / "target"), "--requirement", str(tmp_path / "lock.txt")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "DO NOT MATCH THE HASHES" in ended.stderr
