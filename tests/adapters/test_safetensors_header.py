"""The strict header pass: rows 30, 31 and 34 to 45 of the table of bad inputs, and a fuzz against safetensors."""

import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from weft.adapters.safetensors_header import DTYPE_BYTES, WEIGHTS_FILE, Header, read_header
from weft.config import AdapterLimits
from weft.errors import Code, InvalidAdapter

LIMITS = AdapterLimits()
FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def framed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("../../evil", "x" * 100)
    return file.getvalue()


def tarball() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    return file.getvalue()


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("a pickle was executed",))


MANY = {f"t{i}": tensor("F16", [1], [2 * i, 2 * i + 2]) for i in range(8193)}
TWO_RAW = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
TWO_READINGS = (
    b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
GOOD_RAW = json.dumps({"a": FOUR}).encode()

# name: (file, reason, part of the message)
BAD: dict[str, tuple[bytes, str, str]] = {
    # 30, 31: other formats
    **{
        f"pickle {protocol}": (pickle.dumps({"a": Exploit()}, protocol), "FORMAT_UNSUPPORTED", "safetensors only")
        for protocol in range(6)
    },
    "pickled list": (pickle.dumps([1, 2, 3, 4, 5], 0), "FORMAT_UNSUPPORTED", "safetensors only"),
    "torch zip": (archive(), "FORMAT_UNSUPPORTED", "safetensors only, given zip"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "FORMAT_UNSUPPORTED", "given zip"),
    "tar": (tarball(), "FORMAT_UNSUPPORTED", "given tar"),
    "gzip": (b"\x1f\x8b\x08" + bytes(7) + b"x" * 600_000, "FORMAT_UNSUPPORTED", "given gzip"),
    "xz": (b"\xfd7zXZ\x00" + bytes(30), "FORMAT_UNSUPPORTED", "given xz"),
    "bzip2": (b"BZh91AY&SY" + bytes(30), "FORMAT_UNSUPPORTED", "given bzip2"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(30), "FORMAT_UNSUPPORTED", "given zstandard"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "FORMAT_UNSUPPORTED", "given 7z"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(30), "FORMAT_UNSUPPORTED", "given GGUF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(30), "FORMAT_UNSUPPORTED", "given HDF5"),
    "ONNX": (b"\x08\x07\x12\x07pytorch" + bytes(30), "FORMAT_UNSUPPORTED", "given ONNX"),
    # 34
    "no byte": (b"", "HEADER_TOO_SHORT", "at least 8 bytes (limit 8), given 0"),
    "seven bytes": (b"1234567", "HEADER_TOO_SHORT", "given 7"),
    # 35
    "longer than the file": (framed(GOOD_RAW, b"0000", 10_000), "HEADER_TOO_LARGE", "given 10000"),
    "longer by one": (framed(b"{}", b"", 3), "HEADER_TOO_LARGE", "(limit 2), given 3"),
    "1 MiB and 1": (framed(b"{" + b" " * (1 << 20) + b"}"), "HEADER_TOO_LARGE", "(limit 1048576), given 1048578"),
    "2**63": (framed(GOOD_RAW, b"0000", 1 << 63), "HEADER_TOO_LARGE", "given 9223372036854775808"),
    "2**64 - 1": (framed(GOOD_RAW, b"0000", (1 << 64) - 1), "HEADER_TOO_LARGE", "given 18446744073709551615"),
    # 36
    "length 0": (bytes(8), "HEADER_INVALID", "must start with {"),
    "length 0 and data": (bytes(8) + b"{}", "HEADER_INVALID", "must end with }"),
    "leading space": (framed(b" " + GOOD_RAW, b"0000"), "HEADER_INVALID", "must start with {"),
    "leading mark": (framed(b"\xef\xbb\xbf" + GOOD_RAW, b"0000"), "HEADER_INVALID", "must start with {"),
    "list": (framed(b"[]"), "HEADER_INVALID", "must start with {"),
    "text": (framed(b"lora"), "HEADER_INVALID", "must start with {"),
    "not UTF-8": (framed(b'{"\xff":1}'), "HEADER_INVALID", "is not UTF-8"),
    "UTF-16": (framed("{}".encode("utf-16-le")), "HEADER_INVALID", "must end with }"),
    "not JSON": (framed(b"{a}"), "HEADER_INVALID", "is not JSON"),
    "two objects": (framed(b"{}{}"), "HEADER_INVALID", "is not JSON"),
    "newline padding": (framed(GOOD_RAW + b"\n", b"0000"), "HEADER_INVALID", "must end with } and spaces"),
    "zero padding": (framed(GOOD_RAW + b"\0\0", b"0000"), "HEADER_INVALID", "must end with } and spaces"),
    "NaN": (framed(b'{"a":NaN}'), "HEADER_INVALID", "holds NaN"),
    "tensor is a list": (framed({"a": []}), "HEADER_INVALID", "tensor a: must be described by exactly"),
    "tensor is a number": (framed({"a": 1}), "HEADER_INVALID", "tensor a: must be described by exactly"),
    "key missing": (framed({"a": {"dtype": "F32", "shape": [1]}}, b"0000"), "HEADER_INVALID", "exactly"),
    "key too many": (framed({"a": FOUR | {"path": "x"}}, b"0000"), "HEADER_INVALID", "exactly"),
    # 37
    "tensor twice": (framed(TWO_RAW, bytes(8)), "DUPLICATE_KEY", "holds a key twice, given a"),
    "two readings": (framed(TWO_READINGS, b"0000"), "DUPLICATE_KEY", "holds a key twice, given a"),
    "tensor twice by escape": (framed(TWO_RAW.replace(b',"a"', b',"\\u0061"'), bytes(8)), "DUPLICATE_KEY", "given a"),
    "metadata twice": (
        framed(b'{"__metadata__":{},"__metadata__":{"format":"pt"}}'),
        "DUPLICATE_KEY",
        "given __metadata__",
    ),
    "metadata twice inside": (framed(b'{"__metadata__":{"k":"1","k":"2"}}'), "DUPLICATE_KEY", "given k"),
    "shape twice": (framed(GOOD_RAW[:-2] + b',"shape":[1]}}', b"0000"), "DUPLICATE_KEY", "given shape"),
    # 38
    "overlap": (
        framed({"a": FOUR, "b": tensor(offsets=[2, 6])}, bytes(6)),
        "OFFSETS_INVALID",
        "tensor b overlaps the tensor before it: must begin at 4, given 2",
    ),
    "same bytes": (framed({"a": FOUR, "b": FOUR}, bytes(4)), "OFFSETS_INVALID", "overlaps"),
    "hole": (framed({"a": FOUR, "b": tensor(offsets=[8, 12])}, bytes(12)), "OFFSETS_INVALID", "leaves a hole"),
    "first at 4": (framed({"a": tensor(offsets=[4, 8])}, bytes(8)), "OFFSETS_INVALID", "must begin at 0, given 4"),
    "trailing byte": (framed({"a": FOUR}, bytes(5)), "OFFSETS_INVALID", "bytes follow the last tensor"),
    "polyglot": (framed({"a": FOUR}, bytes(4)) + archive(), "OFFSETS_INVALID", "bytes follow the last tensor"),
    "cut off": (framed({"a": FOUR}, bytes(3)), "OFFSETS_INVALID", "beyond the file (limit 3), given 4"),
    # 39
    **{
        f"offsets {name}": (framed({"a": tensor(offsets=offsets)}, bytes(8)), "OFFSETS_INVALID", "tensor a: ")
        for name, offsets in {
            "negative": [-4, 0],
            "float": [0, 4.0],
            "text": ["0", "4"],
            "bool": [False, 4],
            "null": [None, 4],
            "one": [4],
            "three": [0, 4, 8],
            "no list": 4,
            "object": {"0": 4},
            "2**63": [0, 1 << 63],
            "2**64 + 4": [0, (1 << 64) + 4],
            "10**300": [0, 10**300],
            "1e3": [0, 1e3],
            "backwards": [8, 4],
        }.items()
    },
    "offsets of 5000 digits": (framed(GOOD_RAW.replace(b"4]", b"9" * 5000 + b"]"), b"0000"), "HEADER_INVALID", "400"),
    "minus zero": (framed(GOOD_RAW.replace(b"[0,", b"[-0,"), b"0000"), "HEADER_INVALID", "with a sign"),
    # 40, 42
    **{
        f"shape {name}": (framed({"a": tensor(shape=shape, offsets=offsets)}, bytes(4)), "SHAPE_INVALID", "tensor a: ")
        for name, shape, offsets in [
            ("overflow", [1 << 32, 1 << 32], [0, 4]),
            ("overflow to zero", [1 << 62, 4], [0, 0]),
            ("overflow to four", [(1 << 62) + 1, 1], [0, 4]),
            ("too big", [2], [0, 4]),
            ("too small", [1, 1], [0, 8]),
            ("negative", [-1], [0, 4]),
            ("two negatives", [-1, -1], [0, 4]),
            ("float", [1.0], [0, 4]),
            ("bool", [True], [0, 4]),
            ("text", ["1"], [0, 4]),
            ("number", 1, [0, 4]),
            ("object", {"0": 1}, [0, 4]),
            ("2**63", [1 << 63], [0, 4]),
            ("rank 0", [], [0, 4]),
            ("rank 9", [1] * 9, [0, 4]),
            ("zero", [0], [0, 0]),
            ("zero in the middle", [4, 0, 4], [0, 0]),
        ]
    },
    "zero-size tensor beside another": (
        framed({"a": FOUR, "b": tensor(shape=[0], offsets=[0, 0])}, bytes(4)),
        "SHAPE_INVALID",
        "tensor b: ",
    ),
    # 41
    **{
        f"dtype {dtype}": (framed({"a": tensor(dtype)}, bytes(4)), "DTYPE_UNSUPPORTED", "must be F16, BF16 or F32")
        for dtype in ["F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "F32 ", None, 1, ["F32"], {}]
    },
    # 43
    "depth 10000": (framed(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "HEADER_INVALID", "nests deeper than 3"),
    "depth 4": (framed(b'{"a":{"shape":[[]]}}'), "HEADER_INVALID", "nests deeper than 3"),
    "offsets nested": (framed({"a": tensor(offsets=[[0], [4]])}, bytes(4)), "HEADER_INVALID", "nests deeper than 3"),
    "depth in metadata": (framed(b'{"__metadata__":{"k":[{}]}}'), "HEADER_INVALID", "nests deeper than 3"),
    "deep and closed late": (framed(b'{"a":' * 70_000 + b"1" + b"}" * 70_000), "HEADER_INVALID", "nests deeper"),
    "deep behind a quote": (framed(b'{"\\"' + b"[" * 500_000 + b"}"), "HEADER_INVALID", "header"),
    "100000 keys": (
        framed(b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}"),
        "HEADER_INVALID",
        "more keys and values than tensors",
    ),
    "400000 sizes": (
        framed(b'{"a":{"shape":[' + b",".join([b"1"] * 400_000) + b"]}}"),
        "HEADER_INVALID",
        "more keys and values than tensors",
    ),
    "500000 quotation marks": (framed(b"{" + b'"' * 500_000 + b"}"), "HEADER_INVALID", "more keys and values"),
    "500000 backslashes": (framed(b'{"' + b"\\" * 500_000 + b'"}'), "HEADER_INVALID", "is not JSON"),
    "key of 1000000 characters": (framed({"k" * 1_000_000: FOUR}, b"0000"), "HEADER_INVALID", "name must have at most"),
    "half a surrogate pair": (framed({"\ud800": FOUR}, b"0000"), "HEADER_INVALID", "half a surrogate pair"),
    "raw surrogate": (framed(b'{"\xed\xa0\x80":1}'), "HEADER_INVALID", "is not UTF-8"),
    "control character": (framed(b'{"a\n":1}'), "HEADER_INVALID", "is not JSON"),
    # 44
    **{
        f"metadata {name}": (framed({"__metadata__": metadata, "a": FOUR}, b"0000"), "METADATA_INVALID", "__metadata__")
        for name, metadata in {
            "list": [],
            "null": None,
            "text": "pt",
            "number inside": {"format": 1},
            "null inside": {"format": None},
            "object inside": {"format": {}},
            "too large": {"k": "v" * (16 * 1024)},
            "too many": {str(i): "vvvv" for i in range(3000)},
        }.items()
    },
    # 45
    "8193 tensors": (framed(MANY, bytes(2 * 8193)), "TENSOR_COUNT", "from 1 to 8192, given 8193"),
    "8193 tensors of nothing": (
        framed(b"{" + b",".join(b'"%d":{"data_offsets":0}' % i for i in range(8193)) + b"}"),
        "TENSOR_COUNT",
        "given 8193",
    ),
    "no tensor": (framed(b"{}"), "TENSOR_COUNT", "from 1 to 8192, given 0"),
    "only metadata": (framed({"__metadata__": {"format": "pt"}}), "TENSOR_COUNT", "given 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_quickly_and_without_memory(name: str, tmp_path: Path) -> None:
    data, reason, rule = BAD[name]
    path = tmp_path / "file"
    path.write_bytes(data)
    started = time.thread_time()
    with path.open("rb") as file, pytest.raises(InvalidAdapter) as caught:
        read_header(file, LIMITS)
    assert time.thread_time() - started < 0.2, "50 ms on a quiet machine"
    error = caught.value
    assert (error.code, error.reason, error.field) == (Code.INVALID_ARGUMENT, reason, WEIGHTS_FILE)
    assert error.message.startswith(f"{WEIGHTS_FILE}: ")
    assert rule in error.message
    assert error.message.isprintable()
    assert len(error.message) < 300
    with pytest.raises(InvalidAdapter) as again:
        read_header(data, LIMITS)
    assert again.value.message == error.message


def test_nothing_is_allocated_because_a_header_claims_it() -> None:
    claims = [
        framed(b"{", length=1 << 40),
        framed(b"{" + b" " * 100, length=(1 << 63) - 1),
        framed({"a": tensor(shape=[1 << 40], offsets=[0, 1 << 42])}, bytes(4)),
    ]
    for data in claims:
        tracemalloc.start()
        with pytest.raises(InvalidAdapter):
            read_header(data, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000


def test_metadata_is_kept_as_text_and_nothing_else() -> None:
    hostile = {"format": "pt", "<script>": "{{ 7 * 7 }}", "\x1b[31m": "\0", "a" * 100: "é😀"}
    header = read_header(framed({"__metadata__": hostile, "a": FOUR}, b"0000"), LIMITS)
    assert header.metadata == hostile


def test_limits_are_inclusive() -> None:
    text = "v" * (LIMITS.metadata_bytes_max - 1)
    assert read_header(framed({"__metadata__": {"k": text}, "a": FOUR}, b"0000"), LIMITS).metadata == {"k": text}
    most = {name: MANY[name] for name in list(MANY)[:8192]}
    assert (
        len(read_header(framed(most | {"__metadata__": {"{": '"data_offsets"'}}, bytes(2 * 8192)), LIMITS).tensors)
        == 8192
    )
    padded = GOOD_RAW + b" " * (LIMITS.header_bytes_max - len(GOOD_RAW))
    assert list(read_header(framed(padded, b"0000"), LIMITS).tensors) == ["a"]
    assert list(read_header(framed({"k" * 512: FOUR}, b"0000"), LIMITS).tensors) == ["k" * 512]


def test_a_header_of_640_bytes_is_no_pickle() -> None:
    data = framed(GOOD_RAW + b" " * (640 - len(GOOD_RAW)), b"0000")
    assert data.startswith(b"\x80\x02")
    assert list(read_header(data, LIMITS).tensors) == ["a"]


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size)[:100]

    with pytest.raises(InvalidAdapter, match="cut off"):
        read_header(Shrinking(framed(GOOD_RAW + b" " * 200, b"0000")), LIMITS)


def test_entries_hold_absolute_offsets_in_the_order_of_the_bytes() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(4, dtype=np.float16)}
    data = save(arrays, {"format": "np"})
    header = read_header(data, LIMITS)
    assert header.metadata == {"format": "np"}
    assert set(header.tensors) == {"a", "b"}
    assert [entry.begin for entry in header.tensors.values()] == sorted(e.begin for e in header.tensors.values())
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert (entry.name, entry.shape, entry.end - entry.begin) == (name, array.shape, array.nbytes)
        assert data[entry.begin : entry.end] == array.tobytes()


def agrees_with_safetensors(data: bytes, header: Header) -> bool:
    theirs = dict(deserialize(data))
    return theirs.keys() == header.tensors.keys() and all(
        (theirs[name]["dtype"], tuple(theirs[name]["shape"]), bytes(theirs[name]["data"]))
        == (entry.dtype, entry.shape, data[entry.begin : entry.end])
        for name, entry in header.tensors.items()
    )


def outcome(data: bytes) -> Header | InvalidAdapter:
    """Parse a file; any exception other than InvalidAdapter fails the test."""
    try:
        return read_header(data, LIMITS)
    except InvalidAdapter as error:
        return error


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), max_size=5, unique=True))
    header: dict[str, object] = {}
    end = 0
    for name in [name for name in names if name != "__metadata__"]:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        begin, end = end, end + DTYPE_BYTES[dtype] * int(np.prod(shape))
        header[name] = tensor(dtype, shape, [begin, end])
    items = draw(st.permutations(list(header.items())))
    if draw(st.booleans()):
        items.insert(0, ("__metadata__", draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))))
    raw = json.dumps(dict(items), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return framed(raw + b" " * draw(st.integers(0, 9)), draw(st.binary(min_size=end, max_size=end)))


PIECES = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"9", b".", b"e", b" ", b"\0", b"\xff", b"null"]
PIECES += [
    b"\\u0061",
    b"\\ud800",
    b"true",
    b"NaN",
    b'"a":',
    b'"dtype"',
    b'"F64"',
    b"F16",
    b"18446744073709551616",
    b"\n",
]


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(valid_files()))
    keep_length_right = draw(st.booleans())
    length = int.from_bytes(data[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = at + draw(st.sampled_from([0, 0, 1, 1, 2, 5, 40]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=4))
        before = len(data)
        data[at:until] = piece
        if 8 <= at < 8 + length:
            length += len(data) - before
    if keep_length_right:
        data[:8] = max(0, length).to_bytes(8, "little")
    return bytes(data)


@settings(max_examples=150, deadline=None)
@given(valid_files())
def test_every_valid_file_reads_as_in_safetensors(data: bytes) -> None:
    found = outcome(data)
    if isinstance(found, InvalidAdapter):
        assert found.reason == "TENSOR_COUNT"
    else:
        assert agrees_with_safetensors(data, found)


@settings(max_examples=400, deadline=None)
@given(mutated_files())
@example(framed(GOOD_RAW.replace(b"[0,", b"[-0,"), b"0000"))
@example(framed(GOOD_RAW.replace(b"[1]", b"[01]"), b"0000"))
@example(framed(GOOD_RAW.replace(b"[1]", "[١]".encode()), b"0000"))
@example(framed(GOOD_RAW.replace(b'"a"', b'"\\u0000"'), b"0000"))
@example(framed(GOOD_RAW.replace(b'"a"', b'"\\ud83d\\ude00"'), b"0000"))
@example(framed(GOOD_RAW.replace(b":", b"\t:\r\n"), b"0000"))
def test_a_mutated_file_is_refused_or_reads_as_in_safetensors(data: bytes) -> None:
    found = outcome(data)
    if not isinstance(found, InvalidAdapter):
        assert agrees_with_safetensors(data, found)


def test_a_long_fuzz_with_one_seed() -> None:
    """Byte-level mutations of a real adapter's file, cheaper than with hypothesis and therefore many more."""
    dice = random.Random(20_240_229)
    arrays = {f"base_model.model.layers.{i}.q_proj.lora_A.weight": np.ones((2, 4), np.float32) for i in range(3)}
    original = save(arrays, {"format": "pt"})
    num_accepted = num_refused = 0
    for _ in range(4000):
        data = bytearray(original)
        header_end = 8 + int.from_bytes(data[:8], "little")
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(dice.choice([8, header_end, len(data)]))
            data[at : at + dice.choice([0, 1, 1, 1, 3])] = dice.choice([bytes([dice.randrange(256)]), *PIECES])
        found = outcome(bytes(data))
        if isinstance(found, InvalidAdapter):
            num_refused += 1
        else:
            num_accepted += 1
            assert agrees_with_safetensors(bytes(data), found)
    assert num_accepted > 50, "mutations inside tensor bytes are fine"
    assert num_refused > 1000


@pytest.mark.parametrize(
    "name", ["two readings", "metadata twice inside", "newline padding", "key too many", "only metadata"]
)
def test_the_library_alone_would_accept(name: str) -> None:
    """The control: these are why this pass exists."""
    deserialize(BAD[name][0])


AUDIT = """
import sys
from pathlib import Path
from weft.adapters.ingest import read_config
from weft.adapters.safetensors_header import read_header
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter

limits, root, quiet, seen = AdapterLimits(), Path(sys.argv[1]), True, []
FORBIDDEN = ("pickle", "exec", "compile", "import", "marshal", "code", "function", "subprocess", "os.", "ctypes",
             "socket", "urllib", "shutil", "tempfile", "mmap", "builtins", "cpython.run", "pty", "glob")

def listen(event, args):
    if quiet:
        return
    if event.startswith(FORBIDDEN) or (event == "open" and not str(args[0]).startswith(str(root))):
        seen.append((event, str(args)[:200]))

def attempt(path):
    for read in (lambda: read_header(path.open("rb"), limits), lambda: read_config(path.read_bytes(), limits)):
        try:
            read()
        except InvalidAdapter as error:
            str(error), error.metadata

paths = sorted(root.iterdir())
for path in paths:  # lazily imported codecs are loaded here
    attempt(path)
sys.addaudithook(listen)
quiet = False
for path in paths:
    attempt(path)
if sys.argv[2] == "control":
    __import__("pickle").loads(paths[0].read_bytes())
quiet = True
print(len(paths), seen)
"""


def audited(directory: Path, mode: str) -> str:
    command = [sys.executable, "-c", AUDIT, str(directory), mode]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_parsing_never_unpickles_executes_imports_or_opens_anything(tmp_path: Path) -> None:
    (tmp_path / "000").write_bytes(pickle.dumps(Exploit()))
    for index, (data, _, _) in enumerate(BAD.values(), start=1):
        (tmp_path / f"{index:03}").write_bytes(data)
    assert audited(tmp_path, "quiet") == f"{len(BAD) + 1} []\n"
    control = audited(tmp_path, "control")
    assert "a pickle was executed" in control
    assert "pickle.find_class" in control
