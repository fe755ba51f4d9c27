"""The reference driver: gated deltas computed literally, one segment at a time.

    x' = x + Σ gate · pre(x)
    out[t] = y[t] + Σ over segments holding t of gate[t] · (post(x[t], y[t]) + after(y[t], r[t])),   y = W₀x'

It trains (one segment, all rows, autograd), and it is the oracle that every kernel is tested against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from weft.methods.inject import Driver
from weft.methods.protocol import Method, Site
from weft.methods.shapes import Float, Int


class Segment(NamedTuple):
    """Rows of the flattened batch that share an adapter.

    params: the adapter's parameters by site name.
    rows: None for all rows in order.
    gates: None for 1; or a function that returns them for the layer being computed.
    """

    method: Method
    params: Mapping[str, Any]
    rows: Int[Tensor, " N"] | None = None
    gates: Float[Tensor, " N"] | Callable[[], Float[Tensor, " N"]] | None = None


EnterLayer = Callable[[int, Float[Tensor, "T hidden"]], None]
"""Computes gates at the beginning of a layer, from its index and the hidden states that enter it."""


@dataclass(frozen=True, slots=True)
class ReferenceDriver(Driver):
    """Applies `segments` at every site it is called for, with the gates of `routers`."""

    segments: Sequence[Segment]
    routers: Sequence[EnterLayer] = ()

    @property
    def routes(self) -> bool:
        """Whether there are routers."""
        return bool(self.routers)

    def enter(self, layer: int, hidden: Float[Tensor, "*T hidden"]) -> None:
        """Begin a layer; `hidden` flattens to the rows."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        for enter in self.routers:
            enter(layer, rows)

    @property
    def needs_residual(self) -> bool:
        """Whether any segment reads the residual stream anywhere."""
        return any(segment.method.reads_residual(p) for segment in self.segments for p in segment.params.values())

    def apply(
        self,
        site: Site,
        base: Callable[[Tensor], Tensor],
        x: Float[Tensor, "*T I"],
        residual: Float[Tensor, "*T O"] | None = None,
    ) -> Float[Tensor, "*T O"]:
        """Return the site's output for `x`; leading dimensions flatten to the rows. No argument is written to.

        residual: the stream that entered the site's sublayer; None if there is none or no segment reads it.
        """
        here = [(segment, segment.params[site.name]) for segment in self.segments if site.name in segment.params]
        if not here:
            return base(x)
        rows = x.reshape(-1, x.shape[-1])  # [T, I]
        x_prime = rows
        for segment, params in here:
            if segment.method.pre is not None:
                x_prime = _add(x_prime, segment, segment.method.pre(params, _take(rows, segment)))
        y = base(x_prime.view_as(x))
        y_rows = y.reshape(-1, y.shape[-1])  # [T, O]
        out = y_rows
        for segment, params in here:
            if segment.method.post is not None:
                added = segment.method.post(params, _take(rows, segment), _take(y_rows, segment))
                out = _add(out, segment, added)
            if segment.method.after is not None:
                r_rows = None if residual is None else _take(residual.reshape(y_rows.shape), segment)
                out = _add(out, segment, segment.method.after(params, _take(y_rows, segment), r_rows))
        return out.view_as(y)


def _take(tensor: Float[Tensor, "T F"], segment: Segment) -> Float[Tensor, "N F"]:
    return tensor if segment.rows is None else tensor[segment.rows]


def _add(total: Float[Tensor, "T F"], segment: Segment, added: Float[Tensor, "N F"] | None) -> Float[Tensor, "T F"]:
    """Return `total` with the segment's gated `added` on its rows; a new tensor if anything was added."""
    if added is None:
        return total
    if segment.gates is not None:
        gates = segment.gates() if callable(segment.gates) else segment.gates
        added = added * gates[:, None].to(added.dtype)
    return total + added if segment.rows is None else total.index_add(0, segment.rows, added)
