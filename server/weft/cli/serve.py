"""`weft serve`: one option for each knob of `weft.config`, generated from it."""

import inspect
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from weft.cli.offline import fetch_only
from weft.cli.output import fail, size
from weft.config import WeftConfig
from weft.settings import InvalidSettings, Knob, fields_of, knobs, load, type_name

_log = logging.getLogger(__name__)

_ALIASES = {"quantization": ("--quant",)}
_METAVARS = {"integer": "N", "number": "X", "path": "PATH", "text": "TEXT"}


class ServeCommand(TyperCommand):
    """A command whose help groups the options by their section of `weft.config`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _serve(config: Path | None, adapters: list[str] | None, flags: dict[str, Any]) -> None:
    """Serve a base model and its adapters over gRPC.

    Each option with a default can also be set by an environment variable (WEFT_MAX_NUM_SEQS for --max-num-seqs) or in
    the file given by --config (max_num_seqs). An option overrides the environment, which overrides the file.
    """
    try:
        registered = [_adapter_directory(text) for text in adapters or ()]
        configuration = load({name: value for name, value in flags.items() if value not in (None, [])}, file=config)
    except InvalidSettings as error:
        raise fail(str(error), code=2) from None

    directories = tuple(path for _, path in registered)  # given by the operator, so allowed as sources
    configuration = replace(configuration, allowed_sources=(*configuration.allowed_sources, *directories))

    # Importing and loading take from seconds to minutes, and PID 1 of a container ignores a signal without a handler.
    # Nothing is open yet, so exit at once: an exception would be lost if it were raised in a destructor.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    fetch_only(configuration.model.path)
    from weft.api.access.secret_file import UnusableAccess
    from weft.api.serve import run  # imports torch, transformers and gRPC
    from weft.errors import WeftError

    try:
        code = run(configuration, registered)
    except WeftError as error:
        raise fail(f"{error.reason}: {error.message}") from None
    except UnusableAccess as fault:
        raise fail(str(fault), hint=fault.hint, code=2) from None
    except (ValueError, OSError) as error:  # of the checkpoint, the machine or the network
        _log.debug("the server ended", exc_info=True)
        raise fail(str(error)) from None
    except Exception as error:  # a bug of ours or of a library: still one line; the traceback is logged at debug level
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
        what = "is not a directory" if directory.exists() else "does not exist"
        raise InvalidSettings(f"--adapter {adapter_id}: {directory} {what}; give a directory that PEFT or Weft wrote")
    return adapter_id, directory


def _parameters() -> list[inspect.Parameter]:
    """Return the parameters of the command: the file, the adapters, and one for each knob."""
    file = typer.Option("--config", envvar="WEFT_CONFIG", metavar="FILE", help="TOML or YAML file with settings.")
    adapters = typer.Option(
        "--adapter", metavar="ID=PATH", help="Register this PEFT directory before serving. May be repeated."
    )
    annotations = {"config": Annotated[Path | None, file], "adapters": Annotated[list[str] | None, adapters]}
    annotations |= {knob.name: _annotation(knob) for knob in knobs()}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]


def _annotation(knob: Knob) -> Any:
    """Return a knob's annotation for typer: text, which `weft.settings` converts, or a flag if the knob is a bool."""
    if knob.info.is_required():
        argument = typer.Argument(metavar=knob.flag, help=knob.info.description, rich_help_panel="Arguments")
        return Annotated[str | None, argument]
    title = f"{knob.section.capitalize()} ({fields_of(WeftConfig)[knob.section].description})" if knob.section else None
    kind, names, metavar = str, (knob.flag, *_ALIASES.get(knob.name, ())), _metavar(knob)
    if knob.info.annotation is bool:
        kind, names, metavar = bool, (f"{knob.flag}/--no-{knob.flag.removeprefix('--')}",), None
    option = typer.Option(*names, metavar=metavar, help=_help(knob), show_default=False, rich_help_panel=title)
    return Annotated[list[str] | None if knob.is_list else kind | None, option]


def _help(knob: Knob) -> str:
    default = knob.info.get_default(call_default_factory=True)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif default in (None, ()):
        default = "none"
    elif knob.is_size:
        default = size(default)
    return f"{knob.info.description or ''} [{default}]".strip()


def _metavar(knob: Knob) -> str:
    if knob.is_size:
        return "SIZE"
    kind = type_name(knob.info.annotation).removesuffix(" or null").removeprefix("list of ")
    return _METAVARS.get(kind.removesuffix("s"), kind.removeprefix("one of ").replace(", ", "|"))


def _command(**given: Any) -> None:
    _serve(given.pop("config"), given.pop("adapters"), given)


command: Any = _command
command.__doc__ = _serve.__doc__
command.__signature__ = inspect.Signature(_parameters())  # typer makes the options from it
