"""Frozen config dataclasses as text: their keys, their values from strings, and back to YAML.

A value is read as the type that its field declares, so the same text means the same in a file and on a command line
(YAML's own guess would read `1e-3` as a word and `no` as false).
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from weft.config import typed_path

_INTEGER = re.compile(r"[+-]?\d[\d_]*")
_DOCUMENTED = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     {3}.*)*)", re.MULTILINE)


class InvalidRecipe(ValueError):
    """A recipe, or an option in its place, that cannot be followed."""


class Node(NamedTuple):
    """A piece of a recipe. content: text, None for nothing, a list or a mapping. origin: `file:line` or `--option`."""

    content: "str | list[Node] | dict[str, Node] | None"
    origin: str


class Key(NamedTuple):
    """A field that a recipe can set."""

    name: str
    type: Any
    default: Any  # MISSING where it must be given
    help: str


def keys_of(kind: type) -> dict[str, Key]:
    """The fields of a config dataclass; `help` is what its docstring says after the field's name."""
    hints = get_type_hints(kind)
    documented = {
        name: " ".join(text.split())
        for names, text in _DOCUMENTED.findall(kind.__doc__ or "")
        for name in names.split(", ")
    }
    keys = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        keys[field.name] = Key(field.name, hints[field.name], default, documented.get(field.name, ""))
    return keys


def type_name(kind: Any) -> str:
    """How a recipe's reader calls a type."""
    if kind in _NAMES:
        return _NAMES[kind]
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(arm) for arm in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return f"mapping to {type_name(get_args(kind)[1])}s"
    if issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    raise TypeError(f"a recipe has no form for {kind}")


_NAMES: Mapping[Any, str] = types.MappingProxyType(
    {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", types.NoneType: "null"}
)


def value(node: Node, kind: Any, key: str) -> Any:
    """What `node` says, as a `kind`. Raises InvalidRecipe naming where it stands, the key, the type and the text."""
    found = _value(node, kind, key)
    if found is _UNFIT:
        given = "a list" if isinstance(node.content, list) else "a mapping"
        given = given if isinstance(node.content, list | dict) else "nothing" if node.content is None else None
        raise InvalidRecipe(f"{node.origin}: {key}: must be {type_name(kind)}, given {given or repr(node.content)}")
    return found


_UNFIT = object()


def _value(node: Node, kind: Any, key: str) -> Any:
    content = node.content
    if get_origin(kind) in (Union, types.UnionType):
        found = (_value(node, arm, key) for arm in sorted(get_args(kind), key=_breadth))
        return next((one for one in found if one is not _UNFIT), _UNFIT)
    if kind is types.NoneType:
        return None if content in (None, "null") else _UNFIT
    if get_origin(kind) is tuple:
        if isinstance(content, str):  # one value, or several with commas: as options are given
            content = [Node(part.strip(), node.origin) for part in content.split(",") if part.strip()]
        return tuple(value(one, get_args(kind)[0], key) for one in content) if isinstance(content, list) else _UNFIT
    if get_origin(kind) is dict:
        if not isinstance(content, dict):
            return _UNFIT
        names, values = get_args(kind)
        return {
            value(Node(name, one.origin), names, key): value(one, values, f"{key}.{name}")
            for name, one in content.items()
        }
    return _scalar(content, kind) if isinstance(content, str) else _UNFIT


def _breadth(kind: Any) -> int:
    """Text takes everything, so it is tried last; nothing takes least."""
    return 0 if kind is types.NoneType else 2 if kind in (str, Path) else 1


def _scalar(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is Path:
        return typed_path(text) if text else _UNFIT
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _UNFIT)
    if kind is int:
        return int(text) if _INTEGER.fullmatch(text) else _UNFIT
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            return _UNFIT
        return number if math.isfinite(number) else _UNFIT
    return kind(text) if text in set(kind) else _UNFIT


def nearest(given: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for what looks alike, or the known names where nothing does."""
    known = sorted(known)
    alike = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {alike[0]}?" if alike else f"; known are {', '.join(known)}"


def plain(of: Any) -> Any:
    """A config value as YAML and JSON know it."""
    if dataclasses.is_dataclass(of) and not isinstance(of, type):
        return {field.name: plain(getattr(of, field.name)) for field in dataclasses.fields(of)}
    if isinstance(of, Mapping):
        return {str(name): plain(one) for name, one in of.items()}
    if isinstance(of, tuple | list):
        return [plain(one) for one in of]
    if isinstance(of, StrEnum):
        return of.value
    return str(of) if isinstance(of, Path) else of
