"""The command `weft`. Modules that import slowly, such as torch and gRPC, are imported when a command runs."""

from typing import Annotated

import typer

from weft import __version__
from weft.cli import adapters, audit, chat, families, generate, handover, info, inspect, serve, tokens

app = typer.Typer(
    name="weft",
    help="One quantized base model, many adapters of any PEFT method, one continuous batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: in 80 columns, rich's table cuts off the names of options
    pretty_exceptions_show_locals=False,
)
app.command(name="serve", cls=serve.ServeCommand)(serve.command)
app.add_typer(adapters.app, name="adapters")
app.add_typer(tokens.app, name="tokens")
app.add_typer(audit.app, name="audit")
app.command(name="generate")(generate.command)
app.command(name="chat")(chat.command)
app.command(name="info")(info.command)
app.command(name="families")(families.command)
app.command(name="inspect")(inspect.command)
for _name, _app, _help in (
    ("train", "app", "Train an adapter; see `weft train --help`."),
    ("train-many", "many", "Train many adapters in one pass; see `weft train-many --help`."),
):
    _command = handover.to("weft_training.command", _app, f"weft {_name}")
    app.command(name=_name, help=_help, **handover.SETTINGS)(_command)
app.command(name="demo", **handover.SETTINGS)(handover.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weft {__version__}")
        raise typer.Exit


@app.callback()
def _weft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that all commands share: only --version."""


def main() -> None:
    """Run the command in `sys.argv`, and exit."""
    app()
