"""Commands of `weft_training`, which gets all their arguments and is imported only then: training, demo, tools."""

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
        "help_option_names": [],  # --help is for the other side too
    },
    "add_help_option": False,
}


def train(context: typer.Context) -> None:
    """Train an adapter; `weft train --help` tells how."""
    imported("weft_training.command").app(args=context.args, prog_name="weft train")


def train_many(context: typer.Context) -> None:
    """Train many adapters in one pass; `weft train-many --help` tells how."""
    imported("weft_training.joint_command").app(args=context.args, prog_name="weft train-many")


def demo(context: typer.Context) -> None:
    """Show what Weft does, on the demo base."""
    raise typer.Exit(imported("weft_training.demo.tour").main(context.args) or 0)


def tool(name: str) -> Callable[[typer.Context], None]:
    """Return the command `weft adapters NAME`, which needs no server and nothing of the train extra."""

    def hand_over(context: typer.Context) -> None:
        imported("weft_training.tools.commands").app(args=[name, *context.args], prog_name="weft adapters")

    return hand_over


def imported(module: str) -> Any:
    """By name: `weft` does not depend on `weft_training`, which may be absent or lack its own dependencies."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "the train extra has it: pip install 'weft-serve[train]'"
        raise fail(f"{error.name} is not installed", hint=hint) from None
