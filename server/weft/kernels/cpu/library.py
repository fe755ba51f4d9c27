"""Load the C++ kernels, once per process.

They are plain C functions without torch or Python headers, so one library serves every version of both. It is one that
the wheel carries, chosen by what this processor can do, or else one that is compiled here at first use (cache.py).

The library is linked without an OpenMP runtime. When it is loaded, its symbols resolve against the runtime that torch
has already made global, so both share one pool of threads. With a torch without OpenMP it does not load.
"""

import ctypes
import functools
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  its import makes the OpenMP runtime global

from weft.kernels.cpu import build, cache

_PREBUILT = Path(__file__).parent / "prebuilt"  # in an installed wheel only

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


LogCall = Callable[[str, bytes, tuple[object, ...]], None]
"""Receives a kernel's name, its record, and the objects that the record points at."""

_log_call: ContextVar[LogCall | None] = ContextVar("_log_call", default=None)


class Library(NamedTuple):
    """The loaded kernels, or the reason why there are none.

    kind: the instruction set of a prebuilt library (build.py, INSTRUCTION_SETS), or "native" for one compiled here.
    """

    functions: ctypes.CDLL | None
    kind: str
    reason: str  # "" when loaded


@functools.cache
def load() -> Library:
    """Return the kernels of this machine, compiling them if no prebuilt library runs on it (up to half a minute)."""
    try:
        kind, path = _choose(os.environ.get("WEFT_KERNELS", ""))
        return Library(opened(path), kind, "")
    except build.KernelsUnavailable as error:
        return Library(None, "", str(error))
    except OSError as error:
        return Library(None, "", f"the CPU kernels do not load: {error}")


def opened(path: Path) -> ctypes.CDLL:
    """Return the kernels of the library at `path`. Raises OSError if it does not load."""
    functions = ctypes.CDLL(str(path))
    for name in _FUNCTIONS:
        # One packed record, not a list of arguments: ctypes converts sixteen in 1.5 us, packing takes 0.4 us.
        getattr(functions, name).argtypes = (ctypes.c_char_p,)
    return functions


def prebuilt(directory: Path, features: Set[str]) -> tuple[str, Path] | None:
    """Return name and path of the best library in `directory` that runs on a processor with these features."""
    for name, (_, needed) in build.INSTRUCTION_SETS.items():
        path = directory / f"{name}.so"
        if needed <= features and path.exists():
            return name, path
    return None


def processor_features() -> frozenset[str]:
    """Return the features of this processor as Linux names them; none if it does not report them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    # A virtual machine may mix processors: take what all of them support.
    found = [frozenset(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")]
    return frozenset.intersection(*found) if found else frozenset()


def _choose(wanted: str) -> tuple[str, Path]:
    """Return kind and path of the library. wanted: WEFT_KERNELS, "" or "native"."""
    if wanted not in ("", "native"):
        raise build.KernelsUnavailable(f"WEFT_KERNELS: may be 'native' (compile here) or unset, given {wanted!r}")
    found = None if wanted else prebuilt(_PREBUILT, processor_features())
    return found or ("native", cache.native(cache.directory()).path)


def available() -> bool:
    """Return whether the kernels can run here; the first call may compile them."""
    return load().functions is not None


def functions() -> ctypes.CDLL:
    """Return the loaded kernels. Raises KernelsUnavailable (build.py) with the reason."""
    library = load()
    if library.functions is None:
        raise build.KernelsUnavailable(library.reason)
    return library.functions


def run(kernel: str, record: bytes, *held: object) -> None:
    """Call a kernel with its packed record. Raises the error that its status means.

    held: the objects that the record points at and that outlive the call, besides the rows of a step.
    """
    _require_ok(getattr(functions(), kernel)(record))
    log_call = _log_call.get()
    if log_call is not None:
        log_call(kernel, record, held)


@contextmanager
def logging_to(log_call: LogCall) -> Iterator[None]:
    """Log every kernel call of this thread after it has run."""
    before = _log_call.set(log_call)
    try:
        yield
    finally:
        _log_call.reset(before)


def replay_of(calls: Sequence[tuple[str, bytes]]) -> Callable[[], None]:
    """Return one call that makes all these kernel calls with the same records, whose operands must still exist then."""
    loaded = functions()
    records = [ctypes.create_string_buffer(record, len(record)) for _, record in calls]
    kernels = [ctypes.cast(getattr(loaded, kernel), ctypes.c_void_p).value or 0 for kernel, _ in calls]
    pairs = zip(kernels, map(ctypes.addressof, records), strict=True)
    table = array("q", [number for pair in pairs for number in pair])
    record = struct.pack("=2q", table.buffer_info()[0], len(calls))  # WeftReplay in replay.cpp

    def replay(held: tuple[object, ...] = (records, table)) -> None:
        _require_ok(loaded.weft_replay(record))

    return replay


def _require_ok(status: int) -> None:
    if status:
        raise MemoryError(_STATUSES[status]) if status == 1 else ValueError(_STATUSES[status])
