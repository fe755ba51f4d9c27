"""A step's mixtures as the reference driver reads them: for each request a router, and a segment per expert."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot, SlotTable
from weft.engine.gatings import RoutedRun, Routing
from weft.methods.driver import Routed, Segment

_Run = tuple[int, int, tuple[AdapterSlot, ...], tuple[float, ...]]


class _Traced(Routed):
    """Also writes a run's gates into the step's trace, and their logarithms where attention reads them."""

    def __init__(
        self, slots: SlotTable, run: RoutedRun, trace: Tensor | None, log_gates: Tensor | None, device: torch.device
    ) -> None:
        config, params = slots.router(run.slot)
        steering = type(run.wishes)(*(None if wish is None else wish.to(device) for wish in run.wishes))
        super().__init__(config, params, torch.arange(run.first, run.last, device=device), steering, run.pooled)
        self._log_gates = None if log_gates is None else log_gates[run.first : run.last]
        self._spans = run.spans
        self._trace = trace
        self._at = run.traced_at

    def enter(self, layer: int, rows: Tensor) -> None:
        super().enter(layer, rows)
        for span, expert in enumerate(self._spans):
            assert self._log_gates is not None
            self._log_gates[:, span] = self.by_layer[-1][:, expert].log()
        if self._trace is not None and self._at >= 0:
            made = self.by_layer[-1].reshape(-1)
            self._trace[layer, self._at : self._at + len(made)] = made.to(self._trace)


class ReferenceRouters:
    """The routers of a step. routed: one for each request of a mixture."""

    def __init__(self, slots: SlotTable, routing: Routing | None, device: torch.device) -> None:
        self._log_gates = None if routing is None else routing.log_gates
        self._slots = slots
        self._device = device
        self._runs = () if routing is None else routing.runs
        self._trace = None if routing is None else routing.trace
        self.routed: Sequence[Routed] = ()

    def split(self, runs: Sequence[_Run], sample_rows: Tensor | None) -> tuple[tuple[_Run, ...], list[Segment]]:
        """The runs without a router, and the segments of those with one.

        sample_rows: which of the batch's rows the runs' rows are, once the body has been asked for; None for all.
        """
        if not self._runs:
            return tuple(runs), []
        if sample_rows is None:
            self.routed = [_Traced(self._slots, run, self._trace, self._log_gates, self._device) for run in self._runs]
        segments: list[Segment] = []
        first_rows: set[int] = set()
        for run, router in zip(self._runs, self.routed, strict=True):
            rows = torch.arange(run.first, run.last)
            if sample_rows is not None:
                here = (sample_rows >= run.first) & (sample_rows < run.last)
                rows, within = here.nonzero()[:, 0], sample_rows[here] - run.first
            else:
                within = rows - run.first
            if not len(rows):
                continue
            first_rows.add(int(rows[0]))
            for slot, expert in zip(run.slots, run.experts, strict=True):
                gates = _at(router, expert, within.to(self._device))
                method, params = self._slots.method(slot), self._slots.params(slot)
                segments.append(Segment(method, params, rows.to(self._device), gates))
        return tuple(run for run in runs if run[0] not in first_rows), segments


def _at(router: Routed, expert: int, rows: Tensor) -> Callable[[], Tensor]:
    return lambda: router.of(expert)()[rows]
