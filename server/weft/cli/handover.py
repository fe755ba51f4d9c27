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


def train(context: typer.Context) -> None:
    """Train an adapter; see `weft train --help`."""
    imported("weft_training.command").app(args=context.args, prog_name="weft train")


def train_many(context: typer.Context) -> None:
    """Train many adapters in one pass; see `weft train-many --help`."""
    imported("weft_training.joint_command").app(args=context.args, prog_name="weft train-many")


def demo(context: typer.Context) -> None:
    """Demonstrate Weft on the demo base."""
    raise typer.Exit(imported("weft_training.demo.tour").main(context.args) or 0)


def tool(name: str) -> Callable[[typer.Context], None]:
    """Return the command `weft adapters NAME`, which needs neither a server nor the train extra."""

    def hand_over(context: typer.Context) -> None:
        imported("weft_training.tools.commands").app(args=[name, *context.args], prog_name="weft adapters")

    return hand_over


def imported(module: str) -> Any:
    """Import a module by name, since `weft_training` is optional: it, or its dependencies, may not be installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "install the train extra: pip install 'weft-serve[train]'"
        raise fail(f"{error.name} is not installed", hint=hint) from None
