"""Output of the commands: consoles, texts that cannot control the terminal, sizes, enum labels, JSON, errors."""

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

_WIDTH_WITHOUT_TERMINAL = 200  # a pipe has no width, and cells that are cut off there are lost


def console(*, stderr: bool = False) -> Console:
    """Return a console on the present standard output or error; texts are not parsed for markup."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _WIDTH_WITHOUT_TERMINAL
    return made


def fail(text: str, *, hint: str = "", code: int = 1) -> typer.Exit:
    """Print an error in one red line, with a remedy below it, and return the exit to raise."""
    print_error(text, hint=hint)
    return typer.Exit(code)


def print_error(text: str, *, hint: str = "") -> None:
    """Print an error, and continue."""
    errors = console(stderr=True)
    errors.print(Text(printable(" ".join(text.splitlines())), style="red"), soft_wrap=True)
    if hint:
        errors.print(Text(printable(hint), style="dim"), soft_wrap=True)


def note(text: str) -> None:
    """Print a remark to standard error, apart from the output."""
    console(stderr=True).print(Text(printable(text), style="dim"), soft_wrap=True)


def write(text: str) -> None:
    """Write generated text at once, and unchanged if it goes to a file or a pipe."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Print one line, however long."""
    console().print(Text(printable(text)), soft_wrap=True)


def printable(text: str) -> str:
    """Return `text` with control characters escaped, except line breaks and tabs: it cannot control a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def size(count: float) -> str:
    """Format a number of bytes: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f}".removesuffix(".0") + f" {unit}"
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + " GiB"


def label(message: "Message", field: str) -> str:
    """Return the name of an enum field's value without the enum's own: ADAPTER_STATE_ACTIVE is "active"."""
    enum: Any = message.DESCRIPTOR.fields_by_name[field].enum_type
    value = enum.values_by_number.get(getattr(message, field))
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    return str(getattr(message, field)) if value is None else value.name.removeprefix(prefix).lower()


def moment(timestamp: "Timestamp") -> str:
    """Format a time in the machine's time zone, to the second."""
    return timestamp.ToDatetime(tzinfo=UTC).astimezone().isoformat(sep=" ", timespec="seconds")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> None:
    """Print one line for each row; on a terminal, cells that do not fit are cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    console().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, omitting empty values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(printable(value)))
    console().print(table)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON, with messages as proto JSON with the protos' own field names; 64-bit integers are strings there."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False, default=as_json))


def as_json(message: "Message") -> dict[str, Any]:
    """Return a message as `print_json` prints it."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
