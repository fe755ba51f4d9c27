"""Safetensors files as numpy arrays, including bfloat16, a type that numpy lacks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER_LENGTH_BYTES = 8
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each tensor in a directory's safetensors files and its values in float32, one at a time.

    Raises FileNotFoundError if there are no files, and ValueError for a type other than F32, F16 and BF16.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: holds no safetensors file")
    for file in files:
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    data = np.memmap(file, np.uint8, "r")
    start = _HEADER_LENGTH_BYTES + int.from_bytes(data[:_HEADER_LENGTH_BYTES].tobytes(), "little")
    header = json.loads(data[_HEADER_LENGTH_BYTES:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: {name} is {entry['dtype']}, none of {', '.join(_DTYPES)}")
        first, last = entry["data_offsets"]
        stored = data[start + first : start + last].view(_DTYPES[entry["dtype"]])
        yield name, _float32(stored, is_bfloat16=entry["dtype"] == "BF16").reshape(entry["shape"])


def _float32(stored: np.ndarray, *, is_bfloat16: bool) -> np.ndarray:
    if is_bfloat16:  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
