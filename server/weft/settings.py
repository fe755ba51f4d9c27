"""Build configs from text: the server's from flags, the environment and a file; the trainer's from recipes.

`build` makes a config from the values of a source: pydantic converts and checks them by the types, limits and defaults
that the config's class declares. A refused value is reported in one line, under its name in that source.

`load` is for the server. Every field of WeftConfig and of its sections is one knob, and each source has its own name
for it. If several sources set a knob, the first in this table counts; if none does, it keeps its default:

    weft.config              flag                      environment                 file, TOML or YAML
    engine.max_num_seqs      --max-num-seqs            WEFT_MAX_NUM_SEQS           max_num_seqs
    residency.device_bytes   --adapter-device-bytes    WEFT_ADAPTER_DEVICE_BYTES   adapter_device_bytes
    allowed_sources          --allowed-source          WEFT_ALLOWED_SOURCES        allowed_sources, a list
                             (may be repeated)         (paths a:b, texts a,b)
    model.path               MODEL                     WEFT_MODEL                  model

pydantic_settings is imported only when values are read, because `weft serve --help` does not need it.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from weft.config import CHECKS, WeftConfig

ENV_PREFIX = "WEFT_"

# The names of their fields are too vague alone.
_SECTION_PREFIXES = {"adapters": "adapter_", "residency": "adapter_", "tenants": "tenant_"}
_NAMES = {"model.path": "model"}
_TYPE_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", NoneType: "null"}
_WORDS = {  # from pydantic's to ours
    "Input should be ": "must be ",
    "Input is not a valid path": "must be a path",
    "Field required": "must be given",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
}

Config = TypeVar("Config")


class InvalidSettings(ValueError):
    """An unusable value, name or file; the text is one line: field, limit, given value, remedy."""


class Knob(NamedTuple):
    """One field of WeftConfig (section "") or of one of its sections."""

    section: str
    field: str
    info: FieldInfo

    @property
    def name(self) -> str:
        """Name of the knob, unique among all sections."""
        own = _SECTION_PREFIXES.get(self.section, "") + self.field
        return _NAMES.get(f"{self.section}.{self.field}", own)

    @property
    def flag(self) -> str:
        if self.info.is_required():
            return self.name.upper()
        return "--" + (self.name.removesuffix("s") if self.is_list else self.name).replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def is_list(self) -> bool:
        return get_origin(self.info.annotation) is tuple

    @property
    def is_size(self) -> bool:
        """Whether the knob counts bytes, by its name."""
        return "bytes" in self.field.split("_")


@cache
def knobs() -> tuple[Knob, ...]:
    """Return all knobs, those without a section first, in the order of `weft.config`."""
    fields = fields_of(WeftConfig)
    found = [Knob("", name, info) for name, info in fields.items() if name not in sections()]
    return (*found, *(Knob(name, *one) for name, kind in sections().items() for one in fields_of(kind).items()))


@cache
def sections() -> dict[str, type[Any]]:
    """Return the fields of WeftConfig that are configs themselves."""
    kinds: dict[str, Any] = {name: info.annotation for name, info in fields_of(WeftConfig).items()}
    return {name: kinds[name] for name in kinds if dataclasses.is_dataclass(kinds[name])}


def load(flags: Mapping[str, object], *, file: Path | None = None) -> WeftConfig:
    """Return the configuration from `flags` (by knob name), the environment, `file` and the defaults.

    Relative paths start at the working directory, also those in `file`; a leading ~ is the home directory.
    """
    from pydantic import create_model
    from pydantic_settings import BaseSettings, EnvSettingsSource

    fields: Any = {knob.name: (Any, None) for knob in knobs()}
    settings = create_model("Settings", __base__=BaseSettings, **fields)
    in_environment = EnvSettingsSource(settings, env_prefix=ENV_PREFIX, env_ignore_empty=True)()
    in_file = {} if file is None else _read(file, settings)
    given = in_file | in_environment | dict(flags)
    values: dict[str, Any] = {section: {} for section in sections()}
    for knob in knobs():
        if knob.name in given:
            part = values[knob.section] if knob.section else values
            part[knob.field] = _plain(given[knob.name], knob)
        elif knob.info.is_required():
            raise InvalidSettings(
                f"{knob.flag} must be given: as an argument, as {knob.variable} or as {knob.name} in a file"
            )

    def spelled(*path: object) -> str:
        """Return the name of a knob in the source of its value."""
        [knob] = [knob for knob in knobs() if (knob.section, knob.field) in (path[:2], ("", path[0]))]
        if knob.name in flags or knob.name not in given:
            return knob.flag
        return knob.variable if knob.name in in_environment else f"{knob.name} in {file}"

    return build(WeftConfig, values, spelled)


def build(kind: type[Config], values: Mapping[str, Any], spelled: Callable[..., str]) -> Config:
    """Return `kind` with these values, converted; nested configs are given as mappings.

    spelled: returns the name of the field at a path in its source.
    Raises InvalidSettings for the first value that the config refuses.
    """
    of_one: Any = list[kind]  # TypeAdapter takes no config for a dataclass alone
    try:
        [made] = TypeAdapter(of_one, config=CHECKS).validate_python([values])
        return made
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    path, text = first["loc"][1:], first["msg"].removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    if isinstance(first["input"], dict) and first["type"] == "value_error":  # raised by a config, about several fields
        field, _, text = text.partition(" ")
        path = (*path, field.rstrip(":"))
    elif first["type"] != "missing":
        given = "nothing" if first["input"] is None else repr(first["input"])
        text = f"{re.sub(', (unable|got) .*| for <.*', '', text)}, given {given}"
    raise InvalidSettings(f"{spelled(*path)} {text}")


def fields_of(kind: type) -> dict[str, FieldInfo]:
    """Return type, default, limits and description of each field of a dataclass, pydantic's or the standard one."""
    if hasattr(kind, "__pydantic_fields__"):
        return kind.__pydantic_fields__
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    return {field.name: FieldInfo.from_annotated_attribute(hints[field.name], field) for field in fields}


def type_name(kind: Any) -> str:
    """Return the name of a type for users."""
    arms = get_args(kind)
    origin = get_origin(kind)
    if origin is Annotated:
        return type_name(arms[0])
    if origin in (Union, UnionType):
        return " or ".join(map(type_name, arms))
    if origin is tuple:
        return f"list of {type_name(arms[0])}s"
    if origin is dict:
        return f"mapping to {type_name(arms[1])}s"
    if origin is Literal or issubclass(kind, StrEnum):
        return "one of " + ", ".join(arms or kind)
    return _TYPE_NAMES[kind]


def nearest(given: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` with the most similar name, or else the known names if they are few."""
    names = sorted(known)
    alike = get_close_matches(given, names, n=1)
    if alike:
        return f"; did you mean {alike[0]}?"
    return f"; known are {', '.join(names)}" if len(names) < 30 else ""


def split(text: str, separator: str = ",") -> list[str]:
    """Return the items of a list given as one text."""
    return [item.strip() for item in text.split(separator) if item.strip()]


def _plain(value: object, knob: Knob) -> object:
    """Return a list given as text as a list, and a bool as text, so that it cannot pass as a number."""
    if knob.is_list and isinstance(value, str):
        return split(value, os.pathsep if "path" in type_name(knob.info.annotation) else ",")
    return str(value).lower() if isinstance(value, bool) else value


def _read(file: Path, settings: Any) -> dict[str, Any]:
    from pydantic_settings import TomlConfigSettingsSource, YamlConfigSettingsSource

    sources = {".toml": TomlConfigSettingsSource, ".yaml": YamlConfigSettingsSource, ".yml": YamlConfigSettingsSource}
    if not file.is_file():
        raise InvalidSettings(f"the file {file} cannot be read: there is no such file")
    if file.suffix not in sources:
        raise InvalidSettings(f"the file must end in {', '.join(sources)}, given {file.suffix!r}")
    try:
        values = sources[file.suffix](settings, file)()
    except Exception as error:  # the parsers have no class of errors in common
        if type(error) in (TypeError, ValueError):  # the parsed file is no mapping
            raise InvalidSettings(f"the file {file} must hold names and values, such as max_num_seqs") from None
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidSettings(f"the file {file} cannot be read as {file.suffix[1:].upper()}: {reason}") from None
    for name in values:
        if name not in settings.model_fields:
            hint = nearest(str(name), settings.model_fields)
            raise InvalidSettings(f"the file {file} sets {name}, which is no knob{hint}")
    return {name: value for name, value in values.items() if value is not None}
