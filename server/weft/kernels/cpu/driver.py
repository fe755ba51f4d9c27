"""The engine's driver of adapter rows, built on the CPU kernels."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from weft.kernels.cpu import deltas, routing
from weft.kernels.slot_tables import CaptureKey, SlotTables
from weft.kernels.step import Step
from weft.methods.inject import apply_each
from weft.methods.protocol import Site


class DriverFactory:
    """Makes one driver per step. Wraps each site's table once, and again only after the table was reallocated."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._table: Tensor | None = None
        self._sites: dict[int, deltas.Site] = {}

    def __call__(self, slots: SlotTables, step: Step) -> "CpuDriver":
        if self._table is not slots.table:
            self._table, self._sites = slots.table, {}
        return CpuDriver(self._sites, self._dtype, slots, step)


def capture_key(slots: SlotTables, slot_of_entry: Tensor) -> CaptureKey:
    """Return a key whose `kinds` is all that a step's driver decides from its entries' slots; kernels read the rest."""
    outputs_at, inputs_at = _acting(slots, slot_of_entry)
    decided = b"%x %x %d %d" % (outputs_at, inputs_at, slots.num_residual_readers > 0, slots.table.shape[1])
    return slots.capture_key._replace(rank=0, kinds=decided, choices=0)


def _acting(slots: SlotTables, slot_of_entry: Tensor) -> tuple[int, int]:
    """Return the sites, as bits, at which some entry adds to the output, and those at which one scales the input."""
    table_rows = set(slot_of_entry.tolist())
    outputs_at = reduce(or_, map(slots.outputs_at.__getitem__, table_rows), 0)
    return outputs_at, reduce(or_, map(slots.inputs_at.__getitem__, table_rows), 0)


class CpuDriver:
    """The gated deltas of one step: one kernel call at each site where a row has any, for any number of adapters.

    sites: the kernels' view of each site that some step has met, by `site.index`; this step adds those it meets first.
    dtype: of the weights of adapters.
    needs_residual: whether any resident adapter reads the residual stream.
    routes: whether a row of the step belongs to a mixture.
    """

    def __init__(self, sites: dict[int, deltas.Site], dtype: torch.dtype, slots: SlotTables, step: Step) -> None:
        entries = step.entries
        assert entries is not None
        self.needs_residual = slots.num_residual_readers > 0
        self.routes = step.routing is not None
        self._sites = sites
        self._dtype = dtype
        self._slots = slots
        self._rows = deltas.pack(entries)
        self._routing = step.routing
        self._outputs_at, self._inputs_at = _acting(slots, entries.slots)
        if step.routing is not None:
            experts = step.routing.experts
            self._target = routing.Target(offsets=entries.offsets, experts=experts, values=entries.gates)
            self._log_target = _span_target(step.routing.span_experts, step.paging.log_gates)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Recompute the gates of all mixtures' rows in one call, as a layer begins."""
        if self._routing is not None:
            routing.route(hidden, layer, self._slots.routers, self._routing, self._target, self._log_target)

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the site's output for `x` [1, T, I], written into the result of `base`. The residual is [1, T, O]."""
        x_prime = x
        if self._inputs_at >> site.index & 1:
            x_prime = torch.empty_like(x)
            deltas.pre(x, x_prime, self._rows, self._sites.get(site.index) or self._wrap(site))
        y = base(x_prime)
        if self._outputs_at >> site.index & 1:
            deltas.post(x, y, self._rows, self._sites.get(site.index) or self._wrap(site), residual)
        return y

    def apply_group(self, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of sites that share an input: from one product, unless an input is scaled."""
        if any(self._inputs_at >> site.index & 1 for site in sites):
            return apply_each(self, sites, base, x)
        outputs = base(x).split([site.out_features for site in sites], -1)
        for site, y in zip(sites, outputs, strict=True):
            if self._outputs_at >> site.index & 1:
                deltas.post(x, y, self._rows, self._sites.get(site.index) or self._wrap(site))
        return outputs

    def _wrap(self, site: Site) -> deltas.Site:
        wrapped = self._sites[site.index] = deltas.Site(
            table=self._slots.table[site.index],
            size_in=site.in_features,
            size_out=site.out_features,
            weight_dtype=self._dtype,
        )
        return wrapped


def _span_target(span_experts: Tensor | None, log_gates: Tensor | None) -> routing.Target | None:
    """Return where the logarithms of gates go: a row has an entry for every span."""
    if span_experts is None or log_gates is None:
        return None
    num_rows, num_spans = span_experts.shape
    offsets = torch.arange(0, (num_rows + 1) * num_spans, num_spans, dtype=torch.int32)
    return routing.Target(offsets=offsets, experts=span_experts.view(-1), values=log_gates.view(-1))
