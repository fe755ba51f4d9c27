"""How the commands write: consoles, texts that cannot steer the terminal, sizes, enum labels, JSON, errors."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

_WIDTH_WITHOUT_TERMINAL = 200  # a pipe has no width, and what is cut off there is lost
_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console(*, stderr: bool = False) -> Console:
    """Standard output or error as it is now, with markup of our own only."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _WIDTH_WITHOUT_TERMINAL
    return made


def fail(text: str, *, hint: str = "", code: int = 1) -> typer.Exit:
    """What to raise after an error: it is told in one red line, with what to do next below it."""
    tell_error(text, hint=hint)
    return typer.Exit(code)


def tell_error(text: str, *, hint: str = "") -> None:
    """Tell of an error and go on."""
    errors = console(stderr=True)
    errors.print(Text(printable(" ".join(text.splitlines())), style="red"), soft_wrap=True)
    if hint:
        errors.print(Text(printable(hint), style="dim"), soft_wrap=True)


def note(text: str) -> None:
    """A remark beside the output, on standard error."""
    console(stderr=True).print(Text(printable(text), style="dim"), soft_wrap=True)


def printable(text: str) -> str:
    """`text` with control characters spelled out, line breaks and tabs aside: no escape sequence reaches a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def size(count: float) -> str:
    """Bytes for people: 1536 is "1.5 KiB"."""
    for unit in _SIZE_UNITS:
        if count < 1024 or unit == _SIZE_UNITS[-1]:
            break
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + f" {unit}"


def label(enum: "EnumTypeWrapper[Any]", value: int) -> str:
    """The name of an enum value without the name of its enum: ADAPTER_STATE_ACTIVE is "active"."""
    name = enum.DESCRIPTOR.values_by_number[value].name if value in enum.values() else str(value)
    prefix = enum.DESCRIPTOR.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower()


def moment(timestamp: "Timestamp") -> str:
    """A time in the zone of this machine, to the second."""
    return timestamp.ToDatetime().astimezone().isoformat(sep=" ", timespec="seconds")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """One line for each row; on a terminal, cells that do not fit are cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, those without a value left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(printable(value)))
    console().print(table)


def print_json(messages: "Message | list[Any]", *, indent: int | None = 2) -> None:
    """Messages as proto JSON with the protos' own field names; 64-bit integers are strings there."""
    shown = [as_json(message) for message in messages] if isinstance(messages, list) else as_json(messages)
    typer.echo(json.dumps(shown, indent=indent, ensure_ascii=False))


def as_json(message: "Message") -> dict[str, Any]:
    """One message as `print_json` writes it."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
