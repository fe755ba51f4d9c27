"""The connection of a command to a server, and hints for calls that fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.output import fail

if TYPE_CHECKING:
    from weft.client import Client, Failure

ServerOption = Annotated[
    str, typer.Option("--server", envvar="WEFT_SERVER", metavar="HOST:PORT", help="Address of the server.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print proto JSON, for programs.")]

_HINTS = {
    "ADAPTER_EXISTS": "--replace registers other content under a taken id",
    "ADAPTER_NOT_FOUND": "`weft adapters ls` lists the registered adapters",
    "VERSION_CONFLICT": "`weft adapters show ID` prints the current digest",
    "SOURCE_NOT_FOUND": "--source is a path on the server; `weft adapters add ID PATH` uploads a local directory",
    "ADAPTER_QUARANTINED": "register other content: `weft adapters add ID PATH --replace`, or `weft adapters lift ID`",
    "BASE_MISMATCH": "`weft info` prints the base model and its modules",
    "TOKEN_MISSING": "set WEFT_TOKEN to a token of this server; its operator makes one with `weft tokens add`",
    "TOKEN_MALFORMED": "WEFT_TOKEN must be the whole line that `weft tokens add` printed",
    "TOKEN_INVALID": "WEFT_TOKEN is unknown to this server, or has expired; `weft tokens ls FILE` lists what it knows",
    "ROLE_REQUIRED": "its operator makes a token with more roles with `weft tokens add`",
    "DRAINING": "the server is stopping; try again when it is back",
}


@contextmanager
def connected(server: str) -> Iterator["Client"]:
    """Yield a client of `server`, with the credentials of the environment.

    A failed call ends the command with one line, a wrong argument or credential with exit code 2.
    """
    from weft.client import Client, RpcFailure  # imports gRPC, which `weft --help` does not need

    try:
        connection = Client(server)
    except OSError as error:  # of a file of WEFT_TLS_CA, WEFT_TLS_CERT or WEFT_TLS_KEY
        raise fail(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise fail(str(error), code=2) from None
    with connection as client:
        try:
            yield client
        except RpcFailure as failure:
            raise fail(str(failure), hint=hint_for(failure.failure, server)) from None
        except OSError as error:
            if error.filename is None:  # no file: the reader of a pipe went away, which typer handles
                raise
            raise fail(f"{error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise fail(str(error), code=2) from None


def hint_for(failure: "Failure", server: str) -> str:
    """Return a remedy for a failed call, or ""."""
    if failure.retry_after_s is not None:
        return f"try again in {failure.retry_after_s:g} s"
    if failure.code.name == "UNAVAILABLE" and not failure.reason:
        if "handshake" in failure.message.lower() or "ssl" in failure.message.lower():
            return "does the server have TLS, with a certificate for this name, signed by WEFT_TLS_CA?"
        return f"is `weft serve` running at {server}? (--server, WEFT_SERVER)"
    return _HINTS.get(failure.reason, "")
