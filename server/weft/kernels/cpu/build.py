"""Compile the C++ kernels: ahead into a wheel, or at first use into the user's cache directory.

This file needs only the standard library, because the hook that builds the wheel (server/hatch_build.py) loads it by
path.

A library in the cache is named for everything that it depends on (the sources, the flags, and what the compiler reports
about itself and this processor) and for its own content. It is loaded as code, so it is used only if no other user can
have written it and its content has the digest in its name.
"""

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = (
    "deltas.cpp",
    "attention.cpp",
    "routing.cpp",
    "elementwise.cpp",
    "gemm.cpp",
    "pointwise.cpp",
    "replay.cpp",
    "overflow.cpp",
)
_HEADERS = ("lanes.h",)
_FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fPIC", "-fvisibility=default")
_NATIVE = ("-march=native",)
_BUILD_S_MAX = 300

_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "x86-64-v4-bf16": (("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    "x86-64-v4": (("-march=x86-64-v4",), _V4),
    "x86-64-v3": (("-march=x86-64-v3",), _V3),
}
"""Libraries in a wheel, best first: the compiler's flags, and the features (as Linux names them) that each needs."""


class KernelsUnavailable(RuntimeError):
    """The CPU kernels cannot run here; the text says why. The torch reference path computes the same."""


def cache_directory() -> Path:
    """Return where compiled kernels live: $XDG_CACHE_HOME/weft/kernels, else ~/.cache/weft/kernels."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError as error:
        raise KernelsUnavailable("no home directory for the compiled CPU kernels: set XDG_CACHE_HOME") from error
    return base / "weft" / "kernels"


def native(directory: Path) -> Path:
    """Return the path of this processor's library in `directory`, compiling it if it is missing (up to half a minute).

    Any number of processes may do this at once: each compiles beside the final name and renames, so that name is absent
    or complete. The directory is private to the user.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        raise KernelsUnavailable(f"no CPU kernels for {platform.machine()}: they need 64-bit x86 or ARM")
    compiler = _compiler()
    target = _run((compiler, *_FLAGS, *_NATIVE, "-E", "-dM", "-x", "c++", os.devnull))  # compiler version and processor
    digest = hashlib.sha256(repr((_FLAGS, target)).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    prefix = digest.hexdigest()[:32]
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(directory)
        for path in sorted(directory.glob(f"{prefix}-*.so")):
            _check_owner(path)
            if path.name == _name(prefix, path.read_bytes()):
                return path
            _log.warning("%s is damaged: the CPU kernels are compiled again", path)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            linked = Path(scratch, "linked.so")
            link(linked, _NATIVE)
            linked.chmod(0o600)
            return _keep(linked, directory / _name(prefix, linked.read_bytes()))
    except OSError as error:
        raise KernelsUnavailable(f"the compiled CPU kernels cannot be kept: {error}; set XDG_CACHE_HOME") from error


def link(path: Path, flags: Sequence[str]) -> None:
    """Compile the kernels for the instructions that `flags` allow, into one library at `path`."""
    compiler = _compiler()
    objects = [str(path.with_name(name).with_suffix(".o")) for name in _SOURCES]
    commands = [
        (compiler, *_FLAGS, *flags, "-c", str(_HERE / source), "-o", result)
        for source, result in zip(_SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    _run((compiler, "-shared", *objects, "-o", str(path)))  # no -fopenmp: library.py says why


def _name(prefix: str, content: bytes) -> str:
    return f"{prefix}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _check_owner(path: Path) -> None:
    """Raise KernelsUnavailable for a path that another user could have written."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise KernelsUnavailable(
            f"{path}: belongs to user {status.st_uid}, and user {os.geteuid()} would load it as code; "
            "remove it, or set XDG_CACHE_HOME to a directory of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelsUnavailable(
            f"{path}: others may write it (mode {stat.S_IMODE(status.st_mode):o}), and it would be loaded as code; "
            "remove it, or set XDG_CACHE_HOME to a directory of your own"
        )


def _keep(source: Path, target: Path) -> Path:
    """Rename a complete file to its final path, durably, and return that path."""
    _sync(source)
    source.replace(target)
    _sync(target.parent)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler for the CPU kernels: install g++ or set CXX to one")
    return compiler


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S_MAX, check=True)  # noqa: S603  our own
    except subprocess.CalledProcessError as error:
        raise KernelsUnavailable(f"the CPU kernels do not compile: {error.stderr.strip()[-400:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the C++ compiler does not run: {error}") from error
    return done.stdout
