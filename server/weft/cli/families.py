"""`weft families`: the table of model families, as measured for this version."""

from dataclasses import asdict
from typing import Annotated

import typer

from weft.cli.connection import JsonOption
from weft.cli.output import fail, print_json, print_line, print_table
from weft.model.families import table


def command(
    name: Annotated[str, typer.Argument(help="Only families whose name contains this.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List model families: those served exactly as transformers and PEFT compute them, and why others are refused."""
    rows = [row for row in table() if name in f"{row.family} {row.variant}"]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    if not rows:
        raise fail(f"no family of that name: {name}", hint="a base that is not in the table is tested when it loads")
    print_table(
        ("family", "variant", "class", "base", "LoRA"),
        ((row.family, row.variant, row.model_class, row.base, row.lora) for row in rows),
    )
    refused = [row for row in rows if row.note]
    if name:
        for row in refused:
            print_line(f"{row.family} {row.variant}".strip() + f": {row.note}")
    else:
        equal = sum(row.base == "equal" for row in rows)
        print_line(f"{equal} of {len(rows)} configurations are equal; `weft families NAME` explains why one is refused")
