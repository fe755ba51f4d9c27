"""What a command has measured, as a table in the terminal, and as text in a document between two markers."""

import re
from collections.abc import Sequence

from rich.table import Table

Cells = Sequence[Sequence[str]]
"""A table's cells, its head first; the first `num_names` columns are no numbers."""


def table(title: str, cells: Cells, *, num_names: int = 1) -> Table:
    """For a terminal."""
    shown = Table(title=title)
    head, *body = cells
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i < num_names else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def markdown(cells: Cells, *, num_names: int = 1) -> str:
    """For a document."""
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    rule = "|".join(["", *["---"] * num_names, *["---:"] * (len(cells[0]) - num_names), ""])
    return "\n".join([head, rule, *body])


def insert(text: str, document: str, name: str) -> str:
    """The document with `text` between the markers `<!-- name -->` and `<!-- /name -->`.

    Raises ValueError unless they are there, once.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"markdown: must hold {start} and {end} on lines of their own, once, found {count} times")
    return changed
