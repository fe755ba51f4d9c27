"""Choose the driver of a step: the kernels' or the reference, for all rows and for the rows that the head sees."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot, SlotTable
from weft.kernels.device import Transfer
from weft.kernels.selection import Kernels
from weft.kernels.step import Entries, RoutedRun, Step, entries_at, row_of_entry
from weft.methods import mixture
from weft.methods.driver import EnterLayer, ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Site, SiteKind


class ByRows(NamedTuple):
    """A driver of all rows of a step, and one of its sample rows, which are all that the output head sees.

    renew: called before the head's driver runs, if routers have changed gates since it was made.
    """

    body: Driver
    head: Driver
    renew: Callable[[], object] | None = None

    @property
    def needs_residual(self) -> bool:
        """Whether the body needs the residual; no sublayer ends at the head."""
        return self.body.needs_residual

    @property
    def routes(self) -> bool:
        """Whether the body routes; the head takes the last layer's gates."""
        return self.body.routes

    def enter(self, layer: int, hidden: Tensor) -> None:
        self.body.enter(layer, hidden)

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        if site.kind is not SiteKind.HEAD:
            return self.body.apply(site, base, x, residual)
        if self.renew is not None:
            self.renew()
        return self.head.apply(site, base, x, residual)

    def apply_group(self, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
        """Return the body's outputs, since the head shares its input with no other site."""
        return self.body.apply_group(sites, base, x)


def driver_of(
    kernels: Kernels, slots: SlotTable, step: Step, there: Step, transfer: Transfer, heads: Sequence[int]
) -> Driver | None:
    """Return the driver of a step that is `step` on the host and `there` on the device; None without adapters.

    heads: indices of the output head's sites.
    """
    if step.entries is None or there.entries is None:
        return None
    body = _of_rows(kernels, slots, step.entries, there)
    if step.samples_all or not any(slots.num_entries[index] for index in heads):
        return body
    at_head, places = entries_at(step.entries, step.sample_rows)
    if not len(at_head.slots):
        return ByRows(body, ReferenceDriver(()))
    *moved, places = transfer.to_device([*at_head, places])
    head_there = there._replace(entries=Entries(*moved), routing=None)
    head = _of_rows(kernels, slots, at_head, head_there)
    if there.routing is None:
        return ByRows(body, head)
    assert head_there.entries is not None
    return ByRows(body, head, partial(torch.index_select, there.entries.gates, 0, places, out=head_there.entries.gates))


def _of_rows(kernels: Kernels, slots: SlotTable, entries: Entries, there: Step) -> Driver:
    """Return the driver of some rows; `entries` are those of `there`, on the host."""
    assert there.entries is not None
    if kernels.driver is not None:
        return kernels.driver(slots, there)
    return ReferenceDriver(list(segments(slots, entries, there.entries.gates)), list(routers(slots, entries, there)))


def segments(slots: SlotTable, entries: Entries, gates: Tensor) -> Iterator[Segment]:
    """Yield the segments that the reference driver reads: the rows of each slot.

    entries: on the host. gates: float32 [N] on the device, read when a site is computed, since routers write them.
    """
    row_of = row_of_entry(entries)
    for number in entries.slots.unique().tolist():
        if number not in slots:  # a further row of an adapter with several
            continue
        slot = AdapterSlot(number)
        places = (entries.slots == slot).nonzero()[:, 0]
        rows, places = row_of[places].to(gates.device), places.to(gates.device)
        yield Segment(slots.method(slot), slots.params(slot), rows, partial(torch.index_select, gates, 0, places))


def routers(slots: SlotTable, entries: Entries, there: Step) -> Iterator[EnterLayer]:
    """Yield what writes the gates in each layer, for each request with a mixture. `entries`: on the host."""
    if there.routing is None:
        return
    row_of = row_of_entry(entries)
    for run in there.routing.runs:
        first, end = int(entries.offsets[run.first]), int(entries.offsets[run.last])
        yield _router(slots, run, there, slice(first, end), row_of[first:end] - run.first)


def _router(slots: SlotTable, run: RoutedRun, there: Step, entries: slice, row_of: Tensor) -> EnterLayer:
    """Return what writes the gates of one request's rows, as kernels do (kernels/cpu/routing.cpp).

    entries: of the run's rows. row_of: the row of each entry, counted from the run's first row.
    """
    assert there.entries is not None
    assert there.routing is not None
    config, params = slots.router(AdapterSlot(run.slot))
    gates_of_entries, trace, log_gates = there.entries.gates[entries], there.routing.trace, there.paging.log_gates
    of_entry = row_of.to(gates_of_entries.device), there.routing.experts[entries].long()

    def enter(layer: int, rows: Tensor) -> None:
        seen = rows[run.first : run.last]
        if run.pooled is not None:
            seen = run.pooled.expand_as(seen)
        gates = mixture.gates(config, params.at(layer), seen, run.bounds)  # [rows, experts]
        gates_of_entries.copy_(gates[of_entry])
        for span, expert in enumerate(run.spans):
            assert log_gates is not None
            log_gates[run.first : run.last, span] = gates[:, expert].log()
        if trace is not None and run.traced_at >= 0:
            trace[layer, run.traced_at : run.traced_at + gates.numel()] = gates.reshape(-1).to(trace)

    return enter
