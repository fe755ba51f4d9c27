"""Where the values of the knobs come from, first to last: flags, the environment, a file, `weft.config`'s defaults.

Every field of WeftConfig and of its sections is one knob. It has one name, spelled for each source:

    weft.config              flag                      environment                 file, TOML or YAML
    engine.max_num_seqs      --max-num-seqs            WEFT_MAX_NUM_SEQS           max_num_seqs
    residency.device_bytes   --adapter-device-bytes    WEFT_ADAPTER_DEVICE_BYTES   adapter_device_bytes
    allowed_sources          --allowed-source, often   WEFT_ALLOWED_SOURCES        allowed_sources, a list
                                                       (paths a:b, texts a,b)
    model.path               MODEL                     WEFT_MODEL                  model

Nothing is listed twice: names, types, defaults and help are read off the dataclasses, whose own checks stay the last
word. pydantic is imported only where values are read, so that `weft --help` need not wait for it.
"""

import dataclasses
import inspect
import os
import tomllib
import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from weft.config import WeftConfig, typed_path

ENV_PREFIX = "WEFT_"

_SECTION_PREFIXES = {"adapters": "adapter_", "residency": "adapter_"}  # their fields say too little on their own
_NAMES = {("model", "path"): "model"}

Config = TypeVar("Config")


class InvalidSettings(ValueError):
    """A value, a name or a file that cannot be used; the text is one line for the operator."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One field of WeftConfig (section "") or of one of its sections.

    kind: type of the value, without None.
    default: `dataclasses.MISSING` where a value must be given.
    help: what the docstring of its section says of it, or "".
    """

    section: str
    field: str
    kind: Any
    default: object
    help: str

    @property
    def name(self) -> str:
        """Unique over all sections."""
        return _NAMES.get((self.section, self.field), _SECTION_PREFIXES.get(self.section, "") + self.field)

    @property
    def flag(self) -> str:
        if self.is_required:
            return self.name.upper()
        name = self.name.removesuffix("s") if self.is_list else self.name
        return "--" + name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def item(self) -> Any:
        """Type of the items of a list."""
        return get_args(self.kind)[0]

    @property
    def is_size(self) -> bool:
        """Whether it counts bytes, as its name says."""
        return self.kind is int and "bytes" in self.field.split("_")

    @property
    def rule(self) -> str:
        """What its type asks of a value."""
        if self.is_size:
            return "must be a size of at least 0, such as 512MiB, 1.5GiB or 4096"
        if self.is_list:
            return "must be a list of paths" if self.item is Path else "must be a list of texts"
        if isinstance(self.kind, type) and issubclass(self.kind, StrEnum):
            return f"must be one of {', '.join(self.kind)}"
        rules = {
            bool: "must be true or false",
            int: "must be a whole number of at least 0",
            float: "must be a number of at least 0",
            Path: "must be a path",
        }
        return rules.get(self.kind, "must be text")


@cache
def knobs() -> tuple[Knob, ...]:
    """All knobs, in the order of `weft.config`."""
    found = list(_knobs_of(WeftConfig, section=""))
    for section, kind in sections().items():
        found += _knobs_of(kind, section=section)
    return tuple(found)


def sections() -> dict[str, type[Any]]:
    """The fields of WeftConfig that are dataclasses themselves."""
    hints = get_type_hints(WeftConfig)
    fields = dataclasses.fields(WeftConfig)
    return {field.name: hints[field.name] for field in fields if dataclasses.is_dataclass(hints[field.name])}


def load(flags: Mapping[str, object], *, file: Path | None = None) -> WeftConfig:
    """The configuration that `flags` (by knob name), the environment, `file` and the defaults give together.

    Relative paths start at the working directory, also those in `file`; a leading ~ is the home directory.
    """
    in_file = {} if file is None else _read(file)
    spelling = _Spelling(flags=flags, file=file, in_file=in_file)
    values = _merged(flags, in_file, spelling)
    parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *sections())}
    for knob in knobs():
        if knob.name in values:
            parts[knob.section][knob.field] = values[knob.name]
        elif knob.is_required:
            raise InvalidSettings(
                f"{knob.flag} must be given: as an argument, as {knob.variable} or as {knob.name} in a file"
            )
    built = {section: _built(kind, section, parts[section], spelling) for section, kind in sections().items()}
    return _built(WeftConfig, "", parts[""] | built, spelling)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    """How an error names a knob: as the source spells it that its value comes from."""

    flags: Mapping[str, object]
    file: Path | None
    in_file: Mapping[str, object]

    def of(self, knob: Knob) -> str:
        if knob.name in self.flags:
            return knob.flag
        if any(variable.upper() == knob.variable and value for variable, value in os.environ.items()):
            return knob.variable
        if knob.name in self.in_file:
            return f"{knob.name} in {self.file}"
        return knob.flag


def _knobs_of(kind: type[Any], *, section: str) -> Iterator[Knob]:
    hints = get_type_hints(kind)
    documented = _documented(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        make = field.default_factory
        yield Knob(
            section=section,
            field=field.name,
            kind=_without_none(hints[field.name]),
            default=field.default if make is dataclasses.MISSING else make(),
            help=documented.get(field.name, ""),
        )


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    [kind] = [part for part in get_args(hint) if part is not types.NoneType]
    return kind


def _documented(kind: type[Any]) -> dict[str, str]:
    """What the lines `field: text` of a dataclass's docstring say, with the indented lines that follow."""
    names = {field.name for field in dataclasses.fields(kind)}
    texts: dict[str, str] = {}
    current = ""
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        name, colon, text = line.partition(": ")
        if colon and name in names:
            current = name
            texts[name] = text.strip()
        elif current and line.startswith("    "):
            texts[current] += " " + line.strip()
        else:
            current = ""
    return texts


def _read(file: Path) -> dict[str, Any]:
    known = [knob.name for knob in knobs()]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"the file {file} cannot be read: {_reason(error)}") from None
    values = _parsed(text, file)
    if not isinstance(values, dict):
        raise InvalidSettings(f"the file {file} must hold names and values, such as max_num_seqs")
    for name in values:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidSettings(f"the file {file} sets {name}, which is no knob{hint}")
    return {name: value for name, value in values.items() if value is not None}


def _parsed(text: str, file: Path) -> Any:
    match file.suffix:
        case ".toml":
            try:
                return tomllib.loads(text)
            except tomllib.TOMLDecodeError as error:
                raise InvalidSettings(f"the file {file} is not TOML: {error}") from None
        case ".yaml" | ".yml":
            import yaml  # comes with transformers

            try:
                return yaml.safe_load(text) or {}
            except yaml.YAMLError as error:
                raise InvalidSettings(f"the file {file} is not YAML: {' '.join(str(error).split())}") from None
        case suffix:
            raise InvalidSettings(f"the file must end in .toml, .yaml or .yml, given {suffix!r}")


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or "no such file") if isinstance(error, OSError) else "it is not UTF-8"


def _merged(flags: Mapping[str, object], in_file: Mapping[str, Any], spelling: _Spelling) -> dict[str, Any]:
    """The values that were given, by knob name, converted; where several sources have one, the first of them counts."""
    from pydantic import ValidationError

    settings = _model(in_file)
    try:
        merged = settings(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        by_name = {knob.name: knob for knob in knobs()}
        knob = by_name[str(first["loc"][0])]
        raise InvalidSettings(f"{spelling.of(knob)} {knob.rule}, given {first['input']!r}") from None
    return {name: value for name, value in merged if name in merged.model_fields_set}


def _model(in_file: Mapping[str, Any]) -> Any:
    """A pydantic-settings class with one optional field for each knob, and the three sources in their order."""
    from pydantic import create_model
    from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

    class Sources(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", validate_default=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=dict(in_file))

    fields: dict[str, Any] = {knob.name: (_accepted(knob), None) for knob in knobs()}
    return create_model("Settings", __base__=Sources, **fields)


def _accepted(knob: Knob) -> Any:
    """The type of `knob` with what a text may look like; numbers are finite and not negative, and no yes or no."""
    from pydantic import AfterValidator, BeforeValidator, ByteSize, Field
    from pydantic_settings import NoDecode

    if knob.is_list:
        if knob.item is Path:
            paths = tuple[Annotated[Path, AfterValidator(Path.expanduser)], ...]
            return Annotated[paths, NoDecode, BeforeValidator(partial(_split, separator=os.pathsep))]
        return Annotated[tuple[knob.item, ...], NoDecode, BeforeValidator(partial(_split, separator=","))]
    if knob.is_size:
        return Annotated[ByteSize, Field(ge=0), AfterValidator(int), BeforeValidator(_no_truth)]
    if knob.kind is int:
        return Annotated[int, Field(ge=0), BeforeValidator(_no_truth)]
    if knob.kind is float:
        return Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]
    if knob.kind is Path:
        return Annotated[Path, BeforeValidator(_path)]
    return knob.kind


def _path(value: object) -> object:
    return typed_path(value) if isinstance(value, str | Path) else value


def _split(items: object, *, separator: str) -> object:
    """Items as the environment separates them: paths by ":" where PATH is separated so, texts by a comma."""
    return [item for item in items.split(separator) if item] if isinstance(items, str) else items


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _built(kind: type[Config], section: str, values: Mapping[str, Any], spelling: _Spelling) -> Config:
    """`kind(**values)`; what it refuses, it names by the field, and the operator is told by the knob's spelling."""
    try:
        return kind(**values)
    except ValueError as error:
        field, _, text = str(error).partition(" ")
        refused = next((knob for knob in knobs() if (knob.section, knob.field) == (section, field)), None)
        raise InvalidSettings(f"{spelling.of(refused)} {text}" if refused else str(error)) from None
