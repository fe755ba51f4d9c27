"""An entry of the user's cache is whole or absent, whatever happened to the process that made it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.model import cache

_MAKE = """
import os, sys
from pathlib import Path
from weft.model import cache

def make(made):
    (made / "file").write_text("whole")
    print("making", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "dies":
        os._exit(0)  # what a signal does that comes early in `weft serve`

print(cache.directory(Path(sys.argv[1]), "name", make))
"""


def _maker(root: Path, fate: str, **environment: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", _MAKE, str(root), fate],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    return process


def _make(made: Path) -> None:
    (made / "file").write_text("whole")


def _in_the_making(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".making-*"))


def test_what_a_killed_maker_left_is_swept(tmp_path: Path) -> None:
    _maker(tmp_path, "dies").communicate("\n", timeout=60)
    assert len(_in_the_making(tmp_path)) == 2
    (tmp_path / ".making-of-an-older-version").mkdir()
    assert (cache.directory(tmp_path, "other", _make) / "file").read_text() == "whole"
    assert _in_the_making(tmp_path) == []


def test_what_a_living_maker_makes_is_left_alone(tmp_path: Path) -> None:
    """Negative control; of two makers of one entry the first wins, and the second uses its result."""
    maker = _maker(tmp_path, "lives")
    found = cache.directory(tmp_path, "name", _make)
    assert len(_in_the_making(tmp_path)) == 2
    inode = found.stat().st_ino
    said, _ = maker.communicate("\n", timeout=60)
    assert said == f"{tmp_path / 'name'}\n"
    assert maker.returncode == 0
    assert found.stat().st_ino == inode
    assert _in_the_making(tmp_path) == []


@pytest.mark.parametrize("point", ["before_fsync", "before_rename"])
def test_nothing_has_its_name_before_it_is_durable(point: str, tmp_path: Path) -> None:
    maker = _maker(tmp_path, "lives", WEFT_FAILPOINT=f"{point}=kill")
    maker.communicate("\n", timeout=60)
    assert maker.returncode < 0  # there is an fsync, and a rename
    assert not (tmp_path / "name").exists()


def test_what_is_not_complete_is_made_again(tmp_path: Path) -> None:
    def is_complete(path: Path) -> bool:
        return (path / "file").is_file()

    (tmp_path / "name").mkdir()
    assert cache.directory(tmp_path, "name", _make, is_complete=is_complete) == tmp_path / "name"
    assert is_complete(tmp_path / "name")

    def never(made: Path) -> None:
        raise AssertionError

    assert cache.directory(tmp_path, "name", never, is_complete=is_complete) == tmp_path / "name"
