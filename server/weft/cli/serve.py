"""`weft serve`: its options are the knobs of `weft.config`, one for each, read off it."""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand

from weft.cli.output import fail, size
from weft.settings import InvalidSettings, Knob, knobs, load, sections

_log = logging.getLogger(__name__)

_ALIASES = {"quantization": ("--quant",)}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


class ServeCommand(TyperCommand):
    """Its help groups the options by the section of `weft.config` that they belong to."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                title = "Arguments" if isinstance(param, TyperArgument) else _TITLES.get(param.name or "", "Options")
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _serve(config: Path | None, adapters: list[str] | None, flags: dict[str, Any]) -> None:
    """Serve a base model and its adapters over gRPC.

    Each option that has a default is also an environment variable (WEFT_MAX_NUM_SEQS for --max-num-seqs) and a name in
    the file that --config names (max_num_seqs), in this order of precedence.
    """
    try:
        registered = [_adapter_directory(text) for text in adapters or ()]
        configuration = load({name: value for name, value in flags.items() if value not in (None, [])}, file=config)
    except InvalidSettings as error:
        raise fail(str(error), code=2) from None

    directories = tuple(path for _, path in registered)  # named here, they are allowed as sources
    configuration = replace(configuration, allowed_sources=(*configuration.allowed_sources, *directories))

    from weft.api.serve import run  # brings torch, transformers and gRPC
    from weft.errors import WeftError

    try:
        code = run(configuration, registered)
    except WeftError as error:
        raise fail(f"{error.reason}: {error.message}") from None
    except (ValueError, OSError) as error:  # what the checkpoint, the machine or the network do not allow
        _log.debug("the server ended", exc_info=True)
        raise fail(str(error)) from None
    except Exception as error:  # a defect of ours or of a library: still one line, and the rest where it is asked for
        _log.debug("the server ended", exc_info=True)
        raise fail(
            f"the server ended with {type(error).__name__}: {error}", hint="--log-level debug shows where"
        ) from None
    raise typer.Exit(code)


def _adapter_directory(text: str) -> tuple[str, Path]:
    adapter_id, separator, path = text.partition("=")
    if not (adapter_id and separator and path):
        raise InvalidSettings(f"--adapter must be ID=PATH, given {text!r}")
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise InvalidSettings(f"--adapter {adapter_id}: {directory} {what}; give a directory that PEFT or Weft wrote")
    return adapter_id, directory


def _parameters() -> list[inspect.Parameter]:
    """What the command takes: the file, the adapters, and one parameter for each knob."""
    file = typer.Option("--config", envvar="WEFT_CONFIG", metavar="FILE", help="TOML or YAML file of knobs.")
    adapters = typer.Option(
        "--adapter", metavar="ID=PATH", help="Register this PEFT directory before serving. May be repeated."
    )
    found = [
        _parameter("config", Annotated[Path | None, file]),
        _parameter("adapters", Annotated[list[str] | None, adapters]),
    ]
    return found + [_parameter(knob.name, _annotation(knob)) for knob in knobs()]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(knob: Knob) -> Any:
    """Texts, which `weft.settings` converts and checks for every source alike; yes and no are two flags."""
    if knob.is_required:
        return Annotated[str | None, typer.Argument(metavar=knob.flag, help=_help(knob))]
    names = (knob.flag, *_ALIASES.get(knob.name, ()))
    if knob.kind is bool:
        names = (f"{knob.flag}/--no-{knob.flag.removeprefix('--')}",)
        option = typer.Option(*names, help=_help(knob), show_default=False)
        return Annotated[bool | None, option]
    option = typer.Option(*names, metavar=_metavar(knob), help=_help(knob), show_default=False)
    return Annotated[list[str] | None if knob.is_list else str | None, option]


def _help(knob: Knob) -> str:
    text = knob.help[:1].upper() + knob.help[1:]
    if knob.is_required:
        return text
    match knob.default:
        case bool():
            default = "yes" if knob.default else "no"
        case None | ():
            default = "none"
        case int() if knob.is_size:
            default = size(knob.default)
        case _:
            default = str(knob.default)
    if text and not text.endswith("."):
        text += "."
    return f"{text} [{default}]".strip()


def _metavar(knob: Knob) -> str:
    if knob.is_size:
        return "SIZE"
    if knob.is_list:
        return _METAVARS[knob.item]
    return "|".join(knob.kind) if issubclass(knob.kind, StrEnum) else _METAVARS[knob.kind]


def _titles() -> dict[str, str]:
    """For each knob of a section its group in the help, named as the section and what its docstring begins with."""
    found = {}
    for section, kind in sections().items():
        about = re.split("[.:;(]", inspect.cleandoc(kind.__doc__ or ""), maxsplit=1)[0].strip()
        title = f"{section.capitalize()} ({about[:1].lower()}{about[1:]})"
        found |= {knob.name: title for knob in knobs() if knob.section == section}
    return found


_TITLES = _titles()


def _command() -> Callable[..., None]:
    """The function that typer reads the options off, and calls."""

    def command(**given: Any) -> None:
        _serve(given.pop("config"), given.pop("adapters"), given)

    described: Any = command
    described.__doc__ = _serve.__doc__
    described.__signature__ = inspect.Signature(_parameters())
    return command


command = _command()
