"""Commands of `weft_training`: training, demo, tools. They import it when they run, and pass it all their arguments."""

import importlib
from collections.abc import Callable
from typing import Any

import typer

from weft.cli.output import fail

SETTINGS: dict[str, Any] = {
    "context_settings": {
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],  # --help is passed on too
    },
    "add_help_option": False,
}


def to(module: str, app: str, prog_name: str, *first: str) -> Callable[[typer.Context], None]:
    """Return the command that passes its arguments, after `first`, to the typer app of that name in a module."""

    def hand_over(context: typer.Context) -> None:
        getattr(imported(module), app)(args=[*first, *context.args], prog_name=prog_name)

    return hand_over


def demo(context: typer.Context) -> None:
    """Demonstrate Weft on the demo base."""
    raise typer.Exit(imported("weft_training.demo.tour").main(context.args) or 0)


def imported(module: str) -> Any:
    """Import a module by name, since `weft_training` is optional: it, or its dependencies, may not be installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "install the train extra: pip install 'weft-serve[train]'"
        raise fail(f"{error.name} is not installed", hint=hint) from None
