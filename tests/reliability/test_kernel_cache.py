"""Attacks on the cache of compiled kernels: no code of another user runs, and damage costs one compilation (T25).

Each case loads the kernels in a process of its own, as a server does. The compiler copies a tiny library.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from weft.kernels.cpu import library

_STRANGER = 12345

_CODE = """
#include <stdio.h>
#include <stdlib.h>
#ifdef HOSTILE
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("MARKER"), "w")); }
#endif
"""
_COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; [ "$1" = -shared ] && linking=1; shift; done
[ -z "$out" ] && echo "#define processor" && exit
[ -z "$linking" ] && exec touch "$out"
echo linked >> "$LINKED" && exec cp "$HONEST" "$out"
"""
# Forks for each load, since torch takes two seconds to import, and a damaged library ends its process.
_LOADER = """
import json, logging, os, sys
from weft.kernels.cpu import library

for line in sys.stdin:
    home, preparation = json.loads(line)
    pid = os.fork()
    if not pid:
        exec(preparation)
        os.environ |= {"XDG_CACHE_HOME": home, "MARKER": f"{home}/marker", "LINKED": f"{home}/linked"}
        logging.basicConfig(filename=f"{home}/log", format="%(message)s")
        loaded = library.load.__wrapped__()
        with open(f"{home}/loaded", "w") as file:
            json.dump([loaded.kind, loaded.reason], file)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
_UNCHECKED = """
from weft.kernels.cpu import cache
cache._fault = lambda status: ""
cache._name = lambda prefix, library: next(p.name for p in cache.directory().glob(f"{prefix}-*.so"))
"""
# Another process with access to the directory exchanges the library right before it is loaded.
_EXCHANGED = """
import ctypes, pathlib, shutil
load = ctypes.CDLL

def exchange(path):
    [kept] = pathlib.Path(os.environ["XDG_CACHE_HOME"], "weft/kernels").glob("*.so")
    shutil.copy(os.environ["HOSTILE"], kept.with_name("new"))
    os.replace(kept.with_name("new"), kept)
    return load(path)

ctypes.CDLL = exchange
"""
_BY_NAME = """
from weft.kernels.cpu import cache
cache.Compiled.path = property(lambda compiled: compiled.kept)
"""


class Loaded(NamedTuple):
    """What one process did: its exit code, the kernels that it has, its compilations and the lines that it logged."""

    code: int
    kernels: list[str]
    num_linked: int
    log: list[str]
    is_attacked: bool


class Rig(NamedTuple):
    """A hostile library, an untouched cache with the honest one, and the process whose forks load."""

    hostile: Path
    cached: Path
    loader: subprocess.Popen[str]

    def load(self, home: Path, preparation: str = "") -> Loaded:
        assert self.loader.stdin
        assert self.loader.stdout
        print(json.dumps([str(home), preparation]), file=self.loader.stdin, flush=True)
        code = int(self.loader.stdout.readline())
        loaded = _taken(home / "loaded")
        return Loaded(
            code,
            json.loads(loaded) if loaded else [],
            len(_taken(home / "linked").split()),
            _taken(home / "log").splitlines(),
            bool((home / "marker").exists()),
        )

    def home(self, home: Path, spoil: Callable[[Path, Path], None]) -> Path:
        """Copy the untouched cache, and spoil its directory or the one library in it."""
        shutil.copytree(self.cached, home)
        spoil(home / "weft" / "kernels", self.hostile)
        return home


def _taken(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    root = tmp_path_factory.mktemp("libraries")
    source, compiler = root / "library.c", root / "compiler"
    source.write_text(_CODE + "".join(f"int {name}(void) {{ return 0; }}\n" for name in library._FUNCTIONS))
    compiler.write_text(_COMPILER)
    compiler.chmod(0o755)
    honest, hostile = root / "honest.so", root / "hostile.so"
    for path, flags in ((honest, ()), (hostile, ("-DHOSTILE",))):
        subprocess.run(("g++", "-xc", "-shared", "-fPIC", *flags, str(source), "-o", str(path)), check=True, timeout=60)
    names = {"CXX": compiler, "HONEST": honest, "HOSTILE": hostile, "WEFT_KERNELS": "native"}
    with subprocess.Popen(
        (sys.executable, "-c", _LOADER),
        env=os.environ | {name: str(value) for name, value in names.items()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as loader:
        made = Rig(hostile, root / "home", loader)
        made.cached.mkdir()
        assert made.load(made.cached) == Loaded(0, ["native", ""], 1, [], False)
        yield made


def _library(directory: Path) -> Path:
    [path] = directory.glob("*.so")
    return path


def _plant(hostile: Path, directory: Path, mode: int, owner: int = -1) -> None:
    """Put a hostile library there instead, under the name that its own content gives it."""
    honest = _library(directory)
    digest = hashlib.sha256(hostile.read_bytes()).hexdigest()[:32]
    path = honest.with_name(f"{honest.name.partition('-')[0]}-{digest}.so")
    honest.unlink()
    shutil.copy(hostile, path)
    path.chmod(mode)
    os.chown(path, owner, -1)


def _overwrite(directory: Path, spoiled: Callable[[bytes], bytes]) -> None:
    path = _library(directory)
    path.write_bytes(spoiled(path.read_bytes()))


def _half(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _link(directory: Path, hostile: Path) -> None:
    _plant(hostile, directory, 0o600)
    path = _library(directory)
    path.rename(directory.parent / "elsewhere.so")
    path.symlink_to(directory.parent / "elsewhere.so")


def _link_directory(directory: Path, hostile: Path) -> None:
    _plant(hostile, directory, 0o600)
    directory.rename(directory.parent / "elsewhere")
    directory.symlink_to(directory.parent / "elsewhere")


def _pipe(directory: Path) -> None:
    path = _library(directory)
    path.unlink()
    os.mkfifo(path, 0o600)


def _untouched(directory: Path, hostile: Path) -> None:
    pass


def _open_directory(directory: Path, hostile: Path, mode: int, owner: int = -1) -> None:
    _plant(hostile, directory, 0o600)
    directory.chmod(mode)
    os.chown(directory, owner, -1)


FILES: dict[str, Callable[[Path, Path], None]] = {
    "zero bytes": lambda path, _: _overwrite(path, lambda whole: b""),
    "half, then zeros": lambda path, _: _overwrite(
        path, lambda whole: whole[: len(whole) // 2].ljust(len(whole), b"\0")
    ),
    "half": lambda path, _: _overwrite(path, lambda whole: whole[: len(whole) // 2]),
    "another content": lambda path, hostile: _overwrite(path, lambda whole: hostile.read_bytes()),
    "others may write it": lambda path, hostile: _plant(hostile, path, 0o666),
    "its group may write it": lambda path, hostile: _plant(hostile, path, 0o620),
    "a link": _link,
    "a pipe": lambda path, _: _pipe(path),
}
DIRECTORIES: dict[str, Callable[[Path, Path], None]] = {
    "others may write there": lambda path, hostile: _open_directory(path, hostile, 0o777),
    "sticky": lambda path, hostile: _open_directory(path, hostile, 0o1777),
    "a link": _link_directory,
}
if os.geteuid() == 0:
    FILES["of a stranger"] = lambda path, hostile: _plant(hostile, path, 0o644, _STRANGER)
    FILES["of a stranger, for all"] = lambda path, hostile: _plant(hostile, path, 0o666, _STRANGER)
    DIRECTORIES["of a stranger"] = lambda path, hostile: _open_directory(path, hostile, 0o755, _STRANGER)


@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_library_is_compiled_once_and_replaced(name: str, rig: Rig, tmp_path: Path) -> None:
    home = rig.home(tmp_path / "home", FILES[name])
    loaded = rig.load(home)
    assert loaded._replace(log=[]) == Loaded(0, ["native", ""], 1, [], False)
    [line] = loaded.log
    assert line.startswith(f"{home}/weft/kernels/")
    assert line.endswith("; the CPU kernels are compiled again")
    assert rig.load(home) == Loaded(0, ["native", ""], 0, [], False)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_beside_a_directory_that_is_not_trusted_every_start_compiles(name: str, rig: Rig, tmp_path: Path) -> None:
    home = rig.home(tmp_path / "home", DIRECTORIES[name])
    for _ in range(2):
        loaded = rig.load(home)
        assert loaded._replace(log=[]) == Loaded(0, ["native", ""], 1, [], False)
        [line] = loaded.log
        assert line.startswith(f"{home}/weft/kernels: ")
        assert "for this process alone" in line


def test_what_is_checked_is_what_is_loaded(rig: Rig, tmp_path: Path) -> None:
    """A library that is exchanged after the check does not run; the next start sees it."""
    home = rig.home(tmp_path / "home", _untouched)
    assert rig.load(home, _EXCHANGED) == Loaded(0, ["native", ""], 0, [], False)
    assert rig.load(home)._replace(log=[]) == Loaded(0, ["native", ""], 1, [], False)


def test_without_the_checks_all_of_this_runs(rig: Rig, tmp_path: Path) -> None:
    """Negative control: the hostile library writes its marker, and damaged ones do not load or end the process."""
    hostile = {"file": FILES["others may write it"], "directory": DIRECTORIES["others may write there"]}
    for name, spoil in hostile.items():
        assert rig.load(rig.home(tmp_path / name, spoil), _UNCHECKED).is_attacked
    for name in ("zero bytes", "half, then zeros", "half"):
        assert rig.load(rig.home(tmp_path / name, FILES[name]), _UNCHECKED)[:2] != (0, ["native", ""])
    assert rig.load(rig.home(tmp_path / "exchanged", _untouched), _EXCHANGED + _BY_NAME).is_attacked
