"""Draw a mixture's gates: a row for each expert, a shaded cell for each layer, and a bar for the mean."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from weft.cli.output import printable

if TYPE_CHECKING:
    from weft.v1.generation_pb2 import AdapterGate

_SHADES = " ░▒▓█"
_BAR_CELLS = 20


def heat(gates: Iterable["AdapterGate"]) -> Table:
    """Return a table of an answer's gates, the first layer on the left. An adapter without layers has only its bar."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("expert", "layers", "mean", ""):
        table.add_column(column, no_wrap=True)
    for gate in gates:
        name = gate.adapter_id or gate.digest[:12]
        cells = "".join(map(_shade, gate.layer_means))
        bar = "━" * round(_BAR_CELLS * min(max(gate.mean, 0.0), 1.0))
        table.add_row(printable(name), Text(cells, style="cyan"), f"{gate.mean:.3f}", Text(bar, style="green"))
    return table


def _shade(gate: float) -> str:
    """Return one of five shades for 0 to 1; a gate above 0 is never blank."""
    step = round(gate * (len(_SHADES) - 1))
    return _SHADES[min(max(step, 1 if gate > 0 else 0), len(_SHADES) - 1)]
