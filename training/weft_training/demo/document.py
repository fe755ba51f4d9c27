"""A command's measurements as a table: in the terminal, or as Markdown between two markers of a document."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

Cells = Sequence[Sequence[str]]
"""A table's cells, header first; all but the first `num_names` columns are numbers."""


def table(title: str, cells: Cells, *, num_names: int = 1) -> Table:
    """Return the table for a terminal."""
    shown = Table(title=title)
    head, *body = cells
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i < num_names else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def markdown(cells: Cells, *, num_names: int = 1) -> str:
    """Return the table for a document."""
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    rule = "|".join(["", *["---"] * num_names, *["---:"] * (len(cells[0]) - num_names), ""])
    return "\n".join([head, rule, *body])


def insert(text: str, document: str, name: str) -> str:
    """Return the document with `text` between the markers `<!-- name -->` and `<!-- /name -->`.

    Raises ValueError unless each marker is there exactly once.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"markdown: must hold {start} and {end} on lines of their own, once, found {count} times")
    return changed


def option(name: str) -> Any:
    """Return the option for a document between whose markers `name` a command writes; it is checked at once."""

    def checked(path: Path | None) -> Path | None:
        if path is not None:
            try:
                insert("", path.read_text(), name)
            except (ValueError, OSError) as error:
                raise typer.BadParameter(str(error)) from None
        return path

    return typer.Option("--markdown", callback=checked, help=f"Write the table into this file, after <!-- {name} -->.")


def publish(title: str, cells: Cells, path: Path | None, name: str, *, num_names: int = 1) -> None:
    """Print the table, and write it between the markers `name` of a document, if one is given."""
    Console().print(table(title, cells, num_names=num_names))
    if path is not None:
        path.write_text(insert(markdown(cells, num_names=num_names), path.read_text(), name))
