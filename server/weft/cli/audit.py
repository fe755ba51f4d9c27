"""`weft audit …`: the audit log of a server."""

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.output import fail, print_line

app = typer.Typer(help="Check the audit log of a server.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _audit() -> None:
    """Make `verify` a command of its own, as more than one would be."""


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The server's --audit-log-file.")],
    holds: Annotated[
        str | None,
        typer.Option(metavar="DIGEST", help="Fail unless a line has this digest, printed by an earlier verification."),
    ] = None,
) -> None:
    """Check the chain of an audit log, and name the first line that was changed, removed, inserted or moved.

    Lines cut off at the end, or a log that was written again as a whole, are found by --holds alone: keep the digest
    that this command prints where those who can write the log cannot.
    """
    from weft.api.access.audit_chain import BrokenChain, digests
    from weft.api.access.audit_chain import verify as end_of

    try:
        with file.open("rb") as lines:
            head = end_of(lines)
        with file.open("rb") as lines:
            if holds is not None and holds not in digests(lines):
                raise fail(f"{file}: no line has the digest {holds}: lines were cut off, or written again")
    except BrokenChain as broken:
        raise fail(f"{file}: {broken}") from None
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from None
    print_line(f"{head.seq} lines, unbroken; the last one is {head.digest}")
