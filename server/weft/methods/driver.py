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


class Segment(NamedTuple):
    """Rows of the flattened batch that share an adapter.

    params: the adapter's parameters by site name.
    rows: int64 [N], or None for all rows in order.
    gates: float32 [N], or None for 1; or a function that returns them for the layer being computed.
    """

    method: Method
    params: Mapping[str, Any]
    rows: Tensor | None = None
    gates: Tensor | Callable[[], Tensor] | None = None


EnterLayer = Callable[[int, Tensor], None]
"""Computes gates at the beginning of a layer, from its index and the hidden states [T, hidden] that enter it."""


@dataclass(frozen=True, slots=True)
class ReferenceDriver(Driver):
    """Applies `segments` at every site it is called for, with the gates of `routers`."""

    segments: Sequence[Segment]
    routers: Sequence[EnterLayer] = ()

    @property
    def routes(self) -> bool:
        """Whether there are routers."""
        return bool(self.routers)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Begin a layer; `hidden` [..., hidden] flattens to the rows."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        for enter in self.routers:
            enter(layer, rows)

    @property
    def needs_residual(self) -> bool:
        """Whether any segment reads the residual stream anywhere."""
        return any(segment.method.reads_residual(p) for segment in self.segments for p in segment.params.values())

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the site's output for `x` [..., I]; leading dimensions flatten to the rows. No argument is written to.

        residual: the stream that entered the site's sublayer [..., O]; None if there is none or no segment reads it.
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


def _take(tensor: Tensor, segment: Segment) -> Tensor:
    return tensor if segment.rows is None else tensor[segment.rows]


def _add(total: Tensor, segment: Segment, added: Tensor | None) -> Tensor:
    """Return `total` [T, F] with the segment's gated `added` [N, F] on its rows; a new tensor if anything was added."""
    if added is None:
        return total
    if segment.gates is not None:
        gates = segment.gates() if callable(segment.gates) else segment.gates
        added = added * gates[:, None].to(added.dtype)
    return total + added if segment.rows is None else total.index_add(0, segment.rows, added)
