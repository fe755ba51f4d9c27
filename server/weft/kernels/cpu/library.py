"""Build and load of the C++ kernels, once per machine.

The sources beside this file are compiled on first use into the user's cache directory, under a name that is the digest
of everything the result depends on: the sources, the flags, and what the compiler says of itself and this processor.
They are plain C functions without torch or Python headers, so one library serves every version of both.

The library is linked without an OpenMP runtime. Its symbols resolve, when it is loaded, against the runtime that torch
has already made global. So both share one pool of threads, and a torch without OpenMP is a reason not to load.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  its import makes the OpenMP runtime global

_SOURCES = (
    "deltas.cpp",
    "attention.cpp",
    "routing.cpp",
    "elementwise.cpp",
    "gemm.cpp",
    "pointwise.cpp",
    "replay.cpp",
)
_HEADERS = ("lanes.h",)
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fPIC", "-fvisibility=default")
_BUILD_S_MAX = 300

_FUNCTIONS = (
    "weft_post",
    "weft_pre",
    "weft_store",
    "weft_attend",
    "weft_route",
    "weft_rms_norm",
    "weft_gate",
    "weft_linear",
    "weft_pointwise",
    "weft_replay",
)


class KernelsUnavailable(RuntimeError):
    """The CPU kernels cannot run here; the text says why. The torch reference path computes the same."""


_STATUSES = {  # lanes.h
    1: "no memory for a kernel's scratch",
    2: "offsets: need to begin at 0, never fall, and end at the number of entries",
    3: "slots: one is outside the site's table",
    4: "table: a LoRA or bottleneck slot needs a rank of at least 1",
    5: "kv_slots: one is outside the cache",
    6: "query_start, context_lens, virtual_lens: need to rise from 0 to T, cover the queries, and fit the block table",
    7: "block_tables: a block that would be read is outside the cache",
    8: "residual: a slot of these rows reads it, and none is given",
    9: "routers: a run's slot needs a router of the rows' width, experts below its number, and room in the trace",
    10: "log_gates: need one row for each query row",
    11: "weight: this processor has no product of bfloat16 pairs",
}


Note = Callable[[str, bytes, tuple[object, ...]], None]
"""Is told a kernel's name, its record, and what that points at and is to stay."""

_note: ContextVar[Note | None] = ContextVar("_note", default=None)


class Library(NamedTuple):
    """The loaded kernels, or the reason why there are none."""

    functions: ctypes.CDLL | None
    reason: str  # "" when loaded


@functools.cache
def load() -> Library:
    """The kernels of this machine, compiled if nobody has done it yet (a few seconds)."""
    try:
        path = build(cache_directory())
        functions = ctypes.CDLL(str(path))
    except KernelsUnavailable as error:
        return Library(None, str(error))
    except OSError as error:
        return Library(None, f"the CPU kernels do not load: {error}")
    for name in _FUNCTIONS:
        # One packed record, not a list of arguments: ctypes converts sixteen of them in 1.5 us, packing takes 0.4.
        getattr(functions, name).argtypes = (ctypes.c_char_p,)
    return Library(functions, "")


def available() -> bool:
    """Whether the kernels can run here; the first call may compile them."""
    return load().functions is not None


def functions() -> ctypes.CDLL:
    """The loaded kernels; raises KernelsUnavailable with the reason."""
    library = load()
    if library.functions is None:
        raise KernelsUnavailable(library.reason)
    return library.functions


def run(kernel: str, record: bytes, *held: object) -> None:
    """Call a kernel with its packed record; raises what its status means.

    held: what the record points at and outlives the call, beside rows of a step.
    """
    _answer(getattr(functions(), kernel)(record))
    note = _note.get()
    if note is not None:
        note(kernel, record, held)


@contextmanager
def noting(note: Note) -> Iterator[None]:
    """Tell `note` of every kernel that this thread calls, once it has run."""
    before = _note.set(note)
    try:
        yield
    finally:
        _note.reset(before)


def replay_of(calls: Sequence[tuple[str, bytes]]) -> Callable[[], None]:
    """The kernel calls in one call, with the same records; what these point at has to be there whenever it is made."""
    loaded = functions()
    records = [ctypes.create_string_buffer(record, len(record)) for _, record in calls]
    kernels = [ctypes.cast(getattr(loaded, kernel), ctypes.c_void_p).value or 0 for kernel, _ in calls]
    pairs = zip(kernels, map(ctypes.addressof, records), strict=True)
    table = array("q", [number for pair in pairs for number in pair])
    record = struct.pack("=2q", table.buffer_info()[0], len(calls))  # WeftReplay in replay.cpp

    def replay(held: tuple[object, ...] = (records, table)) -> None:
        _answer(loaded.weft_replay(record))

    return replay


def _answer(status: int) -> None:
    if status:
        raise MemoryError(_STATUSES[status]) if status == 1 else ValueError(_STATUSES[status])


def cache_directory() -> Path:
    """Where compiled kernels live: $XDG_CACHE_HOME/weft/kernels, else ~/.cache/weft/kernels."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError as error:
        raise KernelsUnavailable("no home directory for the compiled CPU kernels: set XDG_CACHE_HOME") from error
    return base / "weft" / "kernels"


def build(directory: Path) -> Path:
    """Compile the kernels into `directory`, unless they are there, and return the library's path.

    Any number of processes may do this at once: each compiles beside the final name and renames, so that name is absent
    or complete. The directory is private to the user, because its files are loaded as code.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        raise KernelsUnavailable(f"no CPU kernels for {platform.machine()}: they need 64-bit x86 or ARM")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler for the CPU kernels: install g++ or set CXX to one")
    here = Path(__file__).parent
    target = _run((compiler, *_FLAGS, "-E", "-dM", "-x", "c++", os.devnull))  # compiler version and processor features
    digest = hashlib.sha256(repr((_FLAGS, target)).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((here / name).read_bytes())
    path = directory / f"{digest.hexdigest()[:32]}.so"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            objects = [str(Path(scratch, name).with_suffix(".o")) for name in _SOURCES]
            commands = [
                (compiler, *_FLAGS, "-c", str(here / source), "-o", result)
                for source, result in zip(_SOURCES, objects, strict=True)
            ]
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            linked = Path(scratch, path.name)
            _run((compiler, "-shared", *objects, "-o", str(linked)))  # no -fopenmp: see the top
            linked.replace(path)
    except OSError as error:
        raise KernelsUnavailable(f"the compiled CPU kernels cannot be written: {error}; set XDG_CACHE_HOME") from error
    return path


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S_MAX, check=True)  # noqa: S603  our own
    except subprocess.CalledProcessError as error:
        raise KernelsUnavailable(f"the CPU kernels do not compile: {error.stderr.strip()[-400:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the C++ compiler does not run: {error}") from error
    return done.stdout
