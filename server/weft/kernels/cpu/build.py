"""Compile the C++ kernels: ahead into a wheel, or at first use into the user's cache (cache.py).

This file needs only the standard library, because the hook that builds the wheel (server/hatch_build.py) loads it by
path.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
_HEADERS = tuple(sorted(path.name for path in _HERE.glob("*.h")))  # all of them: each may be in any source
_FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fPIC", "-fvisibility=default")
NATIVE = ("-march=native",)
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


def identity() -> str:
    """Return 32 hex digits of everything that this processor's library depends on: compiler, processor, flags, sources.

    Raises KernelsUnavailable if there are no kernels for this processor, or no compiler.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        raise KernelsUnavailable(f"no CPU kernels for {platform.machine()}: they need 64-bit x86 or ARM")
    target = _run((_compiler(), *_FLAGS, *NATIVE, "-E", "-dM", "-x", "c++", os.devnull))  # its version and processor
    digest = hashlib.sha256(repr((_FLAGS, target)).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:32]


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
