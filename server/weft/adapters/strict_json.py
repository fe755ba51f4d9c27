"""Parse untrusted JSON objects: UTF-8, every key once, only finite numbers, bounded depth.

Python's parser by itself keeps the last of two equal keys, reads NaN, turns 1e999 into infinity, recurses as deep as
the text, and accepts half a surrogate pair. So a few passes over the bytes, which never recurse, measure the depth
first, and the parser's hooks refuse the rest.
"""

import json
import math
import re

_LONG_NUMBER = re.compile(rb"[0-9]{400}")  # beyond any double; int() of a long text is quadratic
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_ONE_KIND_OF_BRACKET = bytes.maketrans(b"{}[]", b"()()")
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class JsonFault(ValueError):
    """A fault of the text; the message continues a sentence that starts with the text's name."""


class DuplicateKeyFault(JsonFault):
    """The same key twice in one object."""

    def __init__(self, name: str) -> None:
        super().__init__("holds a key twice")
        self.name = name


def outside_strings(data: bytes) -> bytes:
    """Return `data` without its strings. A backslash is legal only inside a string, so escaped quotes can go first."""
    return b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def parse_object(data: bytes, *, depth_max: int) -> dict[str, object]:
    """Return the object in `data`, or raise JsonFault; an object inside a list inside an object has depth 3."""
    if data.startswith(_BYTE_ORDER_MARKS):
        raise JsonFault("starts with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonFault(f"is not UTF-8 at byte {error.start}") from None
    bare = outside_strings(data)
    if _LONG_NUMBER.search(bare):
        raise JsonFault("holds a number of 400 digits or more")
    if _is_deeper(bare, depth_max):
        raise JsonFault(f"nests deeper than {depth_max}, or does not close what it opens")
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in data:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise JsonFault(f"is not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise JsonFault("holds half a surrogate pair") from None
    if not isinstance(parsed, dict):
        raise JsonFault("is not an object")
    return parsed


def _is_deeper(bare: bytes, depth_max: int) -> bool:
    brackets = bare.translate(_ONE_KIND_OF_BRACKET, _NOT_BRACKETS)
    for _ in range(depth_max):  # each round removes the innermost pairs
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateKeyFault(name)
        found[name] = value
    return found


def _refuse_constant(name: str) -> float:
    raise JsonFault(f"holds {name}, which is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonFault("holds a number too large for a double")
    return value
