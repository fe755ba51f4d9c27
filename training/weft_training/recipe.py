"""Recipes: a training run as a YAML file, of which the command line can override every key.

    model:          ModelConfig: path, quantization, device, dtype, num_threads; and max_model_len
    adapter:        method, and the fields of its config
    data:           train, evaluation, evaluation_share, max_length, packing
    optimization:   num_steps, batch_size, learning_rate, …
    distillation:   teacher, alpha, temperature, direction    (only where there is a teacher)
    output:         path, overwrite, checkpoint_every, resume, tensorboard, publish, adapter_id, replace

A name without a suffix is that of a recipe that comes with Weft (`lora`), unless there is such a file; its base is the
demo base, wherever that lies.

A key that is not known, a wrong type and a wrong value are refused by file, line and key. `--section.key value` sets
one, and so does `--key value`, except for `distillation`'s keys and those that two sections have.
Relative paths start where the command runs.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from weft.config import ModelConfig
from weft_training import sections, shipped
from weft_training.config import TrainConfig
from weft_training.distillation import DistillationConfig
from weft_training.publish import PublishConfig
from weft_training.schema import InvalidRecipe, Key, Node, keys_of, nearest, value
from weft_training.trained import CONFIGS

# The names that options had before there were recipes, and the shortest ones.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "base": "model.path",
        "data": "data.train",
        "output": "output.path",
        "steps": "optimization.num_steps",
        "lr": "optimization.learning_rate",
        "warmup_steps": "optimization.num_warmup_steps",
        "teacher": "distillation.teacher",
    }
)
_REQUIRED = ("model.path", "data.train", "output.path")


class Recipe(NamedTuple):
    """What to train, and where it goes when it is done."""

    train: TrainConfig
    publish: PublishConfig | None


class Option(NamedTuple):
    """An option as it was given: `--learning-rate 1e-3`; value None where none follows, which means true."""

    spelling: str
    value: str | None


def load(path: Path | None, options: Sequence[Option] = ()) -> Recipe:
    """The recipe in a file, or none, with the options in place of its keys.

    Raises InvalidRecipe (a ValueError) naming where what is wrong stands, OSError for a file that cannot be read.
    """
    tree = _read_named(path) if path is not None else {}
    method = _method(tree, options)
    known = keys(method)
    for section, entries in tree.items():
        if section not in known:
            raise InvalidRecipe(f"{entries[''].origin}: {section}: no such section{nearest(section, known)}")
        for name, node in entries.items():
            if name and name not in known[section]:
                raise InvalidRecipe(f"{node.origin}: {section}.{name}: {_unknown(name, section, method, known)}")
    for option in options:
        section, name = _place(option, method, known)
        node = Node("true" if option.value is None else option.value, option.spelling)
        tree.setdefault(section, {})[name] = node
    for needed in _REQUIRED:
        section, _, name = needed.partition(".")
        if name not in tree.get(section, {}):
            short = next(alias for alias, target in _ALIASES.items() if target == needed)
            raise InvalidRecipe(f"{path or 'weft train'}: {needed}: must be given, here or as --{short}")
    return _build(tree, method, known)


def keys(method: str) -> dict[str, dict[str, Key]]:
    """Every key of a recipe for `method`, by section."""
    fields = keys_of(TrainConfig)
    laid_out = {
        section: {name: fields[field]._replace(name=name) for name, field in placed.items()}
        for section, placed in sections.places(fields).items()
    }
    usual = CONFIGS[method]
    adapter = {name: key._replace(default=getattr(usual, name)) for name, key in keys_of(type(usual)).items()}
    named = Key("method", str, method, "one of " + ", ".join(CONFIGS))
    return {
        "model": {**keys_of(ModelConfig), **laid_out.pop("model")},
        "adapter": {"method": named, **adapter},
        **laid_out,
        "distillation": keys_of(DistillationConfig),
        "output": {**laid_out["output"], **keys_of(PublishConfig)},
    }


def options(arguments: Iterable[str]) -> tuple[Path | None, list[Option]]:
    """The recipe's path and the options of a command line; the path comes first."""
    path: Path | None = None
    found: list[Option] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            spelling, equals, text = argument.partition("=")
            found.append(Option(spelling, text if equals else None))
        elif found and found[-1].value is None:
            found[-1] = found[-1]._replace(value=argument)
        elif path is None and not found:
            path = Path(argument)
        else:
            raise InvalidRecipe(f"{argument!r} belongs to no option; the recipe's path comes first, and once")
    return path, found


def _read_named(path: Path) -> dict[str, dict[str, Node]]:
    """The recipe in a file, or the one of this name that comes with Weft, whose base is where that came to lie."""
    known = shipped.recipes()
    if path.name != str(path) or path.suffix or path.is_file():
        return _read(path)
    if path.name not in known:
        raise InvalidRecipe(f"{path}: no such file, and no recipe that comes with Weft{nearest(path.name, known)}")
    tree = _read(known[path.name])
    base = tree["model"]["path"]
    tree["model"]["path"] = base._replace(content=str(shipped.ROOT / str(base.content)))
    return tree


def _read(path: Path) -> dict[str, dict[str, Node]]:
    """Sections of keys; a section's own place is its key ""."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidRecipe(f"{path}:{line}: is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{path}: is not YAML: {error}") from None
    whole = Node({}, f"{path}:1") if root is None else _node(root, path)
    if not isinstance(whole.content, dict):
        raise InvalidRecipe(f"{whole.origin}: must hold sections, such as `model:`")
    tree: dict[str, dict[str, Node]] = {}
    for section, node in whole.content.items():
        if not isinstance(node.content, dict | None):
            raise InvalidRecipe(f"{node.origin}: {section}: must hold keys and values, given {node.content!r:.60}")
        tree[section] = {"": Node(None, node.origin), **(node.content or {})}
    return tree


def _node(of: yaml.Node, path: Path) -> Node:
    origin = f"{path}:{of.start_mark.line + 1}"
    if isinstance(of, yaml.MappingNode):
        entries: dict[str, Node] = {}
        for key, one in of.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidRecipe(f"{where}: a key must be a word")
            if key.value in entries:
                raise InvalidRecipe(f"{where}: {key.value}: stands here a second time")
            entries[key.value] = _node(one, path)._replace(origin=where)
        return Node(entries, origin)
    if isinstance(of, yaml.SequenceNode):
        return Node([_node(one, path) for one in of.value], origin)
    is_null = of.tag == "tag:yaml.org,2002:null"
    return Node(None if is_null else of.value, origin)


def _method(tree: Mapping[str, Mapping[str, Node]], options: Sequence[Option]) -> str:
    """The method, which decides what the other keys of `adapter` are."""
    node = tree.get("adapter", {}).get("method")
    for option in options:
        if option.spelling in ("--method", "--adapter.method"):
            node = Node(option.value, option.spelling)
    if node is None:
        raise InvalidRecipe(
            f"method: must be one of {', '.join(CONFIGS)}; give adapter.method in a recipe, or --method"
        )
    if not isinstance(node.content, str) or node.content not in CONFIGS:
        raise InvalidRecipe(f"{node.origin}: method: must be one of {', '.join(CONFIGS)}, given {node.content!r}")
    return node.content


def _place(option: Option, method: str, known: Mapping[str, Mapping[str, Key]]) -> tuple[str, str]:
    """Section and key of an option."""
    name = option.spelling.removeprefix("--").replace("-", "_")
    section, dot, key = _ALIASES.get(name, name).partition(".")
    if dot:
        if section not in known:
            raise InvalidRecipe(f"{option.spelling}: no such section{nearest(section, known)}")
        if key not in known[section]:
            raise InvalidRecipe(f"{option.spelling}: {_unknown(key, section, method, known)}")
        return section, key
    places = [section for section in known if name in known[section] and section != "distillation"]
    if len(places) > 1:
        spellings = " or ".join(f"--{section}.{name}" for section in places)
        raise InvalidRecipe(f"{option.spelling}: is in several sections; give {spellings}")
    if not places:
        section = "adapter" if _is_of_some_method(name) else ""
        raise InvalidRecipe(f"{option.spelling}: {_unknown(name, section, method, known)}")
    return places[0], name


def _unknown(name: str, section: str, method: str, known: Mapping[str, Mapping[str, Key]]) -> str:
    if section == "adapter" and _is_of_some_method(name):
        return f"the method {method} has none; its keys are {', '.join(known['adapter'])}"
    candidates = known[section] if section else [key for keys in known.values() for key in keys] + list(_ALIASES)
    return f"no such key{nearest(name, candidates)}"


def _is_of_some_method(name: str) -> bool:
    return any(name in {field.name for field in dataclasses.fields(usual)} for usual in CONFIGS.values())


def _build(tree: Mapping[str, Mapping[str, Node]], method: str, known: Mapping[str, Mapping[str, Key]]) -> Recipe:
    given = {
        section: {name: node for name, node in tree.get(section, {}).items() if name and name != "method"}
        for section in known
    }
    values = {
        section: {name: value(node, known[section][name].type, f"{section}.{name}") for name, node in entries.items()}
        for section, entries in given.items()
    }
    published = {name: values["output"].pop(name) for name in keys_of(PublishConfig) if name in values["output"]}
    placed = sections.places(keys_of(TrainConfig))
    fields, origins = {}, {}
    for section, keys_ in placed.items():
        for name in [name for name in keys_ if name in values[section]]:
            fields[keys_[name]] = values[section].pop(name)
            origins[keys_[name]] = given[section][name]
    model = _made(ModelConfig, values["model"], given["model"])
    adapter = _made(type(CONFIGS[method]), dataclasses.asdict(CONFIGS[method]) | values["adapter"], given["adapter"])
    distillation = None
    if values["distillation"]:
        if "teacher" not in values["distillation"]:
            origin = next(iter(given["distillation"].values())).origin
            raise InvalidRecipe(f"{origin}: distillation.teacher: must be given")
        distillation = _made(DistillationConfig, values["distillation"], given["distillation"])
    whole = {**fields, "model": model, "adapter": adapter, "distillation": distillation}
    train = _made(TrainConfig, whole, origins)
    publish = None
    if published.get("publish"):
        publish = PublishConfig(**published)
    elif published:
        name = next(iter(published))
        raise InvalidRecipe(f"{given['output'][name].origin}: output.{name}: needs output.publish")
    return Recipe(train, publish)


def _made(kind: Any, values: Mapping[str, Any], nodes: Mapping[str, Node]) -> Any:
    """The config; what its own checks refuse is told with its place. Their messages begin with the field's name."""
    try:
        return kind(**values)
    except ValueError as error:
        knob = str(error).split(maxsplit=1)[0].rstrip(":")
        if knob in nodes:
            raise InvalidRecipe(f"{nodes[knob].origin}: {error}") from None
        raise
