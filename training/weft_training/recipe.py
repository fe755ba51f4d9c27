"""Recipes: a training run as a YAML file, of which the command line can override every key.

    model:          ModelConfig: path, quantization, device, dtype, num_threads; and max_model_len
    adapter:        method, and the fields of its config
    data:           train, evaluation, evaluation_share, max_length, packing
    optimization:   num_steps, batch_size, learning_rate, …
    distillation:   teacher, alpha, temperature, direction    (only with a teacher)
    output:         path, overwrite, checkpoint_every, resume, tensorboard, publish, adapter_id, replace

A name without a suffix means a recipe that ships with Weft (`lora`), unless such a file exists; its base is the demo
base, wherever that lies.

An unknown key, a wrong type and a wrong value are refused with file, line and key. `--section.key value` sets a key,
and so does `--key value`, except for keys of `distillation` and those that two sections have.
Relative paths start in the directory in which the command runs.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml
from pydantic.fields import FieldInfo

from weft.config import ModelConfig
from weft.settings import InvalidSettings, build, fields_of, nearest, split
from weft_training import shipped
from weft_training.config import SECTIONS, TrainConfig, place_of
from weft_training.distillation import DistillationConfig
from weft_training.publish import PublishConfig
from weft_training.trained import CONFIGS

# Option names from before there were recipes, and abbreviations.
_ALIASES: Mapping[str, str] = {
    "base": "model.path",
    "data": "data.train",
    "output": "output.path",
    "steps": "optimization.num_steps",
    "lr": "optimization.learning_rate",
    "warmup_steps": "optimization.num_warmup_steps",
    "teacher": "distillation.teacher",
}
_REQUIRED = ("model.path", "data.train", "output.path")
_SECTIONS = ("model", "adapter", "data", "optimization", "distillation", "output")

Key = tuple[str, str]  # section and name


class Recipe(NamedTuple):
    """The training run, and the destination of its result."""

    train: TrainConfig
    publish: PublishConfig | None


class Given(NamedTuple):
    """The content that a source gives a key.

    origin: `file:line`, or the option as it was spelled: `--learning-rate`.
    content: text, None for nothing, or a list or a mapping of these.
    """

    origin: str
    content: Any


def load(path: Path | None, options: Sequence[Given] = ()) -> Recipe:
    """Return the recipe in a file, or an empty one, with the options in place of its keys.

    Raises InvalidSettings (a ValueError) naming what is wrong and its place, OSError for a file that cannot be read.
    """
    given = _read_named(path) if path is not None else {}
    method = method_of(given, options)
    known = keys(method)
    for (section, name), one in given.items():
        if name not in known[section]:
            raise InvalidSettings(f"{one.origin}: {section}.{name}: {_unknown(f'{section}.{name}', method, known)}")
    for option in options:
        content = {None: "true", "null": None}.get(option.content, option.content)  # a bare option means true
        given[_place(option.origin, method, known)] = option._replace(content=content)
    for needed in _REQUIRED:
        section, _, name = needed.partition(".")
        if (section, name) not in given:
            short = next(alias for alias, target in _ALIASES.items() if target == needed)
            raise InvalidSettings(f"{path or 'weft train'}: {needed}: must be given, here or as --{short}")
    return _build(given, method, known)


def keys(method: str) -> dict[str, dict[str, FieldInfo]]:
    """Return every key of a recipe for `method`, by section."""
    usual = CONFIGS[method]
    known: dict[str, dict[str, FieldInfo]] = {section: {} for section in _SECTIONS}
    known["model"] |= fields_of(ModelConfig)
    known["adapter"]["method"] = FieldInfo(annotation=str, default=method, description="One of " + ", ".join(CONFIGS))
    for name, info in fields_of(type(usual)).items():
        known["adapter"][name] = FieldInfo(
            annotation=info.annotation, default=getattr(usual, name), description=info.description
        )
    for field, info in fields_of(TrainConfig).items():
        if field not in SECTIONS:
            section, name = place_of(field)
            known[section][name] = info
    known["distillation"] |= fields_of(DistillationConfig)
    known["output"] |= fields_of(PublishConfig)
    return known


def options(arguments: Iterable[str]) -> tuple[Path | None, list[Given]]:
    """Return the recipe's path, which comes first, and the options of a command line; a bare one has content None."""
    path: Path | None = None
    found: list[Given] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            spelling, equals, text = argument.partition("=")
            found.append(Given(spelling, text if equals else None))
        elif found and found[-1].content is None:
            found[-1] = found[-1]._replace(content=argument)
        elif path is None and not found:
            path = Path(argument)
        else:
            raise InvalidSettings(f"{argument!r} belongs to no option; the recipe's path comes first, and once")
    return path, found


def _read_named(path: Path) -> dict[Key, Given]:
    """Read the recipe in a file, or the one of this name that ships with Weft, whose base lies beside it."""
    known = shipped.recipes()
    if path.name != str(path) or path.suffix or path.is_file():
        return _read(path)
    if path.name not in known:
        raise InvalidSettings(f"{path}: no such file, and no recipe that comes with Weft{nearest(path.name, known)}")
    given = _read(known[path.name])
    base = given["model", "path"]
    return given | {("model", "path"): base._replace(content=str(shipped.ROOT / base.content))}


def _read(path: Path) -> dict[Key, Given]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidSettings(f"{path}:{line}: is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path}: is not YAML: {error}") from None
    origins: dict[tuple[str, ...], str] = {}
    tree = {} if root is None else _content(root, path, origins)
    if not isinstance(tree, dict):
        raise InvalidSettings(f"{path}:1: must hold sections, such as `model:`")
    for section, content in tree.items():
        place = f"{origins[section,]}: {section}"
        if section not in _SECTIONS:
            raise InvalidSettings(f"{place}: no such section{nearest(section, _SECTIONS)}")
        if not isinstance(content, dict | None):
            raise InvalidSettings(f"{place}: must hold keys and values, given {content!r:.60}")
    return {
        (section, name): Given(origins[section, name], value)
        for section, content in tree.items()
        for name, value in (content or {}).items()
    }


def _content(node: yaml.Node, path: Path, origins: dict[tuple[str, ...], str], above: tuple[str, ...] = ()) -> Any:
    """Return the node as texts, and lists and mappings of them: YAML would read `1e-3` as a word and `no` as false.

    origins: receives the place of each key, by the path of keys down to it.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_content(one, path, origins, above) for one in node.value]
    if not isinstance(node, yaml.MappingNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    found = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidSettings(f"{place}: a key must be a word")
        if key.value in found:
            raise InvalidSettings(f"{place}: {key.value}: stands here a second time")
        found[key.value] = _content(value, path, origins, (*above, key.value))
        origins[(*above, key.value)] = place
    return found


def method_of(given: Mapping[Key, Given], options: Sequence[Given]) -> str:
    """Return the method, which determines the other keys of `adapter`."""
    named = given.get(("adapter", "method"))
    for option in options:
        if option.origin in ("--method", "--adapter.method"):
            named = option
    rule = f"method: must be one of {', '.join(CONFIGS)}"
    if named is None:
        raise InvalidSettings(f"{rule}; give adapter.method in a recipe, or --method")
    if not isinstance(named.content, str) or named.content not in CONFIGS:
        raise InvalidSettings(f"{named.origin}: {rule}, given {named.content!r}")
    return named.content


def _place(spelling: str, method: str, known: Mapping[str, Mapping[str, FieldInfo]]) -> Key:
    """Return section and name of the key that an option sets."""
    name = spelling.removeprefix("--").replace("-", "_")
    name = _ALIASES.get(name, name)
    every = [(section, key) for section in known for key in known[section]]
    places = [(s, key) for s, key in every if name == f"{s}.{key}" or (name == key and s != "distillation")]
    if len(places) > 1:
        spellings = " or ".join(f"--{section}.{name}" for section, _ in places)
        raise InvalidSettings(f"{spelling}: is in several sections; give {spellings}")
    if not places:
        raise InvalidSettings(f"{spelling}: {_unknown(name, method, known)}")
    return places[0]


def _unknown(name: str, method: str, known: Mapping[str, Mapping[str, FieldInfo]]) -> str:
    """Describe the error of a key, `section.key` or the key alone, that no section has."""
    section, _, key = name.rpartition(".")
    if section and section not in known:
        return f"no such section{nearest(section, known)}"
    if section in ("", "adapter") and any(key in fields_of(type(usual)) for usual in CONFIGS.values()):
        return f"the method {method} has none; its keys are {', '.join(known['adapter'])}"
    near = nearest(key, known[section] if section else {*_ALIASES}.union(*known.values()))
    return f"no such key{near or '; --list-keys lists all'}"


def _build(given: Mapping[Key, Given], method: str, known: Mapping[str, Mapping[str, FieldInfo]]) -> Recipe:
    values: dict[str, dict[str, Any]] = {section: {} for section in known}
    for (section, name), one in given.items():
        is_text_of_list = isinstance(one.content, str) and get_origin(known[section][name].annotation) is tuple
        values[section][name] = split(one.content) if is_text_of_list else one.content

    def spelled(section: str, name: str, *rest: object) -> str:
        """Spell a key as its source did; a key that is not given, as another key of its section is spelled."""
        near = (one.origin for key, one in given.items() if key[0] == section)
        origin = given[section, name].origin if (section, name) in given else next(near, "weft train")
        return f"{origin}: {'.'.join(map(str, (section, name, *rest)))}:"

    def spelled_field(field: str, *rest: Any) -> str:
        return spelled(field, *rest) if field in SECTIONS else spelled(*place_of(field), *rest)

    usual = CONFIGS[method]
    del values["adapter"]["method"]
    adapter = build(type(usual), dataclasses.asdict(usual) | values["adapter"], partial(spelled, "adapter"))
    published = {name: values["output"].pop(name) for name in fields_of(PublishConfig) if name in values["output"]}
    fields: dict[str, Any] = {"adapter": adapter, "distillation": values["distillation"] or None}
    for field in fields_of(TrainConfig).keys() - {*SECTIONS}:
        section, name = place_of(field)
        if name in values[section]:
            fields[field] = values[section].pop(name)
    train = build(TrainConfig, fields | {"model": values["model"]}, spelled_field)
    if published and "publish" not in published:
        raise InvalidSettings(f"{spelled('output', next(iter(published)))} needs output.publish")
    publish = build(PublishConfig, published, partial(spelled, "output")) if published else None
    return Recipe(train, publish)
