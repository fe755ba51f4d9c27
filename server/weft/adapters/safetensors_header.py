"""Read the header of a safetensors file strictly: a header that passes means the same to every reader.

    u64 little-endian N | N bytes of JSON, padded with spaces | tensor bytes, without a gap, to the end of the file

Stricter than the format: no duplicate key at any level, no key other than dtype, shape and data_offsets, only F16, BF16
and F32, no empty tensor, no byte outside a tensor, bounded sizes. The file's claims allocate nothing: sizes are Python
integers, compared with the real size of the file before any byte beyond the header is read.
"""

import io
import math
import os
import re
from functools import partial
from typing import BinaryIO, NamedTuple

from weft.adapters.strict_json import DuplicateKeyFault, JsonFault, outside_strings, parse_object
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter, shown
from weft.v1.adapter_files import PEFT_FILES

WEIGHTS_FILE = PEFT_FILES.weights

DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}

_LENGTH_BYTES = 8
_DEPTH_MAX = 3  # the header, a tensor, its shape
_DIMENSIONS_MAX = 8
_NAME_CHARACTERS_MAX = 512
_MARKS_PER_TENSOR = 16  # a tensor takes 10 quotation marks and at most 12 commas
_INTEGER_END = 1 << 63
_FOREIGN_MAGIC: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("zip", re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)")),
    ("gzip", re.compile(rb"\x1f\x8b")),
    ("7z", re.compile(rb"7z\xbc\xaf\x27\x1c")),
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
    ("bzip2", re.compile(rb"BZh[1-9]")),
    ("zstandard", re.compile(rb"\x28\xb5\x2f\xfd")),
    ("GGUF", re.compile(rb"GGUF|GGML")),
    ("HDF5", re.compile(rb"\x89HDF\r\n\x1a\n")),
    ("ONNX", re.compile(rb"\x08[\x01-\x20](\x12|\x3a)")),
    # Binary protocols open with \x80 and their number; the text ones with a mark, a container or a global.
    ("pickle", re.compile(rb"\x80[\x01-\x05]|\([ldtci]|[\]})][q.]|c[\w.]+\n[\w.]+\n")),
    ("tar", re.compile(rb".{257}ustar", re.DOTALL)),
)


class TensorEntry(NamedTuple):
    """One tensor; its bytes are `[begin, end)` of the file."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """tensors: by name, in the order of their bytes. metadata: opaque text, never rendered or obeyed."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(source: BinaryIO | bytes, limits: AdapterLimits, *, field: str = WEIGHTS_FILE) -> Header:
    """Return the checked header of a whole file, or raise InvalidAdapter; `field` is the file's name in its errors."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    file_bytes = file.seek(0, os.SEEK_END)
    raw = _raw_header(file, file_bytes, limits, field)
    data_begin = _LENGTH_BYTES + len(raw)
    parsed = _parsed(raw, limits, field)
    metadata = _metadata(parsed.pop("__metadata__", {}), limits, field)
    if not 1 <= len(parsed) <= limits.num_tensors_max:
        raise _tensor_count(len(parsed), limits, field)
    entries = [_entry(name, described, data_begin, field) for name, described in parsed.items()]
    entries.sort(key=lambda entry: entry.begin)
    _check_layout(entries, data_begin, file_bytes, field)
    if b"-" in raw and b"-" in outside_strings(raw):  # every number above passed as an integer >= 0, so this one is -0
        raise InvalidAdapter.at("HEADER_INVALID", field, "header holds a number with a sign")
    return Header({entry.name: entry for entry in entries}, metadata)


def _raw_header(file: BinaryIO, file_bytes: int, limits: AdapterLimits, field: str) -> bytes:
    """Return the header's bytes, read only once their number is known to be small and all are present."""
    if file_bytes < _LENGTH_BYTES:
        raise InvalidAdapter.rule(
            "HEADER_TOO_SHORT", field, "must have at least 8 bytes", limit=_LENGTH_BYTES, given=file_bytes
        )
    file.seek(0)
    opening = file.read(512)
    length = int.from_bytes(opening[:_LENGTH_BYTES], "little")
    present = file_bytes - _LENGTH_BYTES
    starts_as_object = opening[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
    if not starts_as_object or length > min(present, limits.header_bytes_max):
        found = next((name for name, magic in _FOREIGN_MAGIC if magic.match(opening)), None)
        if found is not None:
            raise InvalidAdapter.rule("FORMAT_UNSUPPORTED", field, "safetensors only", given=found)
    too_large = partial(InvalidAdapter.rule, "HEADER_TOO_LARGE", field)
    if length > present:
        raise too_large("header is longer than the file", limit=present, given=length)
    if length > limits.header_bytes_max:
        raise too_large("header has too many bytes", limit=limits.header_bytes_max, given=length)
    if not starts_as_object:
        raise InvalidAdapter.rule(
            "HEADER_INVALID", field, "header must start with {", given=opening[_LENGTH_BYTES:][:1].decode("latin-1")
        )
    file.seek(_LENGTH_BYTES)
    raw = file.read(length)
    if len(raw) != length:
        raise too_large("header was cut off", limit=length, given=len(raw))
    return raw


def _parsed(raw: bytes, limits: AdapterLimits, field: str) -> dict[str, object]:
    """Return the header as JSON; the numbers of tensors, keys and values are bounded before the parser builds any."""
    if not raw.rstrip(b" ").endswith(b"}"):
        raise InvalidAdapter.at("HEADER_INVALID", field, "header must end with } and spaces")
    num_described = raw.count(b'"data_offsets"')
    if num_described > limits.num_tensors_max:
        raise _tensor_count(num_described, limits, field)
    num_marks_max = (limits.num_tensors_max + 1) * _MARKS_PER_TENSOR + limits.metadata_bytes_max
    num_marks = max(raw.count(b'"'), raw.count(b","))
    if num_marks > num_marks_max:
        rule = "header has more keys and values than tensors"
        raise InvalidAdapter.rule("HEADER_INVALID", field, rule, limit=num_marks_max, given=num_marks)
    try:
        return parse_object(raw, depth_max=_DEPTH_MAX)
    except DuplicateKeyFault as fault:
        raise InvalidAdapter.rule("DUPLICATE_KEY", field, f"header {fault}", given=fault.name) from None
    except JsonFault as fault:
        raise InvalidAdapter.at("HEADER_INVALID", field, f"header {fault}") from None


def _tensor_count(given: int, limits: AdapterLimits, field: str) -> InvalidAdapter:
    most = limits.num_tensors_max
    text = f"number of tensors must be from 1 to {most}, given {given}"
    return InvalidAdapter.at("TENSOR_COUNT", field, text, limit=most, given=given)


def _metadata(given: object, limits: AdapterLimits, field: str) -> dict[str, str]:
    invalid = partial(InvalidAdapter.rule, "METADATA_INVALID", field)
    if not isinstance(given, dict):
        raise invalid("__metadata__ must be an object", given=given)
    for key, value in given.items():
        if not isinstance(value, str):
            raise invalid(f"__metadata__ {shown(key)} must be text", given=value)
    size_bytes = sum(len(text.encode()) for item in given.items() for text in item)
    if size_bytes > limits.metadata_bytes_max:
        raise invalid("__metadata__ has too many bytes", limit=limits.metadata_bytes_max, given=size_bytes)
    return given


def _entry(name: str, given: object, data_begin: int, field: str) -> TensorEntry:
    """Return one tensor's description, checked by itself; `_check_layout` checks how tensors lie side by side."""

    def refused(reason: str, rule: str, value: object) -> InvalidAdapter:
        text = f"tensor {shown(name)}: {rule}, given {shown(value)}"
        return InvalidAdapter.at(reason, field, text, tensor=name, given=value)

    if len(name) > _NAME_CHARACTERS_MAX:
        raise refused("HEADER_INVALID", f"name must have at most {_NAME_CHARACTERS_MAX} characters", len(name))
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise refused("HEADER_INVALID", "must be described by exactly dtype, shape and data_offsets", given)
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refused("DTYPE_UNSUPPORTED", "dtype must be F16, BF16 or F32", dtype)
    if not isinstance(shape, list) or not 1 <= len(shape) <= _DIMENSIONS_MAX:
        raise refused("SHAPE_INVALID", f"shape must be a list of 1 to {_DIMENSIONS_MAX} sizes", shape)
    if not all(type(size) is int and 0 < size < _INTEGER_END for size in shape):
        raise refused("SHAPE_INVALID", "sizes must be integers from 1 to 2**63 - 1", shape)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset < _INTEGER_END for offset in offsets)
    ):
        raise refused("OFFSETS_INVALID", "data_offsets must be two integers from 0 to 2**63 - 1", offsets)
    begin, end = offsets
    if end < begin:
        raise refused("OFFSETS_INVALID", "data_offsets must not run backwards", offsets)
    size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if size_bytes != end - begin:
        raise refused("SHAPE_INVALID", f"shape and dtype need {size_bytes} bytes", end - begin)
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_layout(entries: list[TensorEntry], data_begin: int, file_bytes: int, field: str) -> None:
    """Raise InvalidAdapter unless every byte after the header belongs to exactly one tensor."""
    expected = data_begin
    for entry in entries:
        if entry.begin != expected:
            what = "overlaps the tensor before it" if entry.begin < expected else "leaves a hole before it"
            must, given = expected - data_begin, entry.begin - data_begin
            text = f"tensor {shown(entry.name)} {what}: must begin at {must}, given {given}"
            raise InvalidAdapter.at("OFFSETS_INVALID", field, text, tensor=entry.name, limit=must, given=given)
        expected = entry.end
    if expected != file_bytes:
        what = "tensors end beyond the file" if expected > file_bytes else "bytes follow the last tensor"
        raise InvalidAdapter.rule(
            "OFFSETS_INVALID", field, what, limit=file_bytes - data_begin, given=expected - data_begin
        )
