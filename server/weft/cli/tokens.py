"""`weft tokens …`: the tokens in the token file of a server. They change the file; a running server follows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.output import fail, note, print_json, print_line, print_table

app = typer.Typer(
    help="Make, list and remove the tokens of a server's callers.", no_args_is_help=True, rich_markup_mode=None
)

TokenFile = Annotated[Path, typer.Argument(metavar="FILE", help="The server's --token-file.")]


@app.command()
def add(
    file: TokenFile,
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Whose token it is, such as acme.")],
    role: Annotated[
        list[str],
        typer.Option(
            metavar="ROLE",
            help="generate: requests for text. register: changes of adapters. admin: everything. May be repeated.",
        ),
    ],
    expires_days: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Days until it ends; without it, it never does.")
    ] = None,
) -> None:
    """Make a token and print it, this once: the file holds only the hash of its secret.

    Example: weft tokens add tokens.json --tenant acme --role generate > token
    """
    from weft.api.access import token_file
    from weft.api.access.principal import Role
    from weft.api.access.token import Token

    if not token_file.TENANT_PATTERN.fullmatch(tenant):
        raise typer.BadParameter(f"--tenant must match {token_file.TENANT_PATTERN.pattern}, given {tenant!r}")
    for name in role:
        if name not in tuple(Role):
            raise typer.BadParameter(f"--role must be one of {', '.join(Role)}, given {name!r}")
    token, now = Token.new(), datetime.now(UTC)
    try:
        expires = None if expires_days is None else now + timedelta(days=expires_days)
    except OverflowError:
        raise typer.BadParameter(f"--expires-days must end before the year 10000, given {expires_days}") from None
    stored = token_file.StoredToken(
        token_id=token.token_id,
        sha256=token.sha256,
        tenant=tenant,
        roles=frozenset(map(Role, role)),
        created=now,
        expires=expires,
    )
    with _changing(file):
        token_file.add(file, stored)
    typer.echo(token.spelled())
    note(f"{token.token_id}, {tenant}, {', '.join(sorted(stored.roles))}: this is the only time that it is shown")


@app.command("ls")
def list_tokens(
    file: TokenFile, json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """List the tokens of a file, without their secrets."""
    from weft.api.access import token_file

    with _changing(file):
        tokens = token_file.load(file)
    rows = [
        {
            "id": token.token_id,
            "tenant": token.tenant,
            "roles": sorted(token.roles),
            "created": token.created.isoformat(timespec="seconds"),
            "expires": "never" if token.expires is None else token.expires.isoformat(timespec="seconds"),
            "expired": token.has_expired(datetime.now(UTC).timestamp()),
        }
        for token in tokens.values()
    ]
    if json:
        print_json(rows)
    else:
        print_table(
            ("id", "tenant", "roles", "created", "expires"),
            (
                (
                    row["id"],
                    row["tenant"],
                    ", ".join(row["roles"]),
                    row["created"],
                    row["expires"] + (" (expired)" if row["expired"] else ""),
                )
                for row in rows
            ),
        )


@app.command("rm")
def remove(
    file: TokenFile, token_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the token, not the token.")]
) -> None:
    """Remove a token; a running server refuses it within two seconds."""
    from weft.api.access import token_file

    with _changing(file):
        removed = token_file.remove(file, token_id)
    if removed is None:
        raise fail("ID must be of a token in the file", hint=f"`weft tokens ls {file}` lists them")
    print_line(f"removed: {removed.token_id}, {removed.tenant}")


@contextmanager
def _changing(file: Path) -> Iterator[None]:
    """End the command with one line if the file cannot be used."""
    from weft.api.access.secret_file import UnusableAccess

    try:
        yield
    except UnusableAccess as fault:
        raise fail(str(fault), hint=fault.hint) from None
    except OSError as error:
        raise fail(f"{error.filename or file}: {error.strerror or error}") from None
