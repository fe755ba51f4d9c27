"""From scheduled requests to logits: flatten a step into the tensors of `kernels/step.py`, and compute it.

Python works per request and per token range; work per token is vectorized.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine import token_ranges
from weft.engine.mixtures import MixtureStates, experts_of
from weft.engine.request import GateDetail, MixtureUse, Request
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled
from weft.kernels.step import Entries, Paging, RoutedRun, Routing, Step

SlotsOf = Mapping[Request, tuple[AdapterSlot, ...]]
TableRows = Mapping[AdapterSlot, tuple[int, ...]]


class Stepper:
    """Computes steps on a runner, for the engine, test drivers and benchmarks alike.

    mixtures: state of the requests with a mixture, from their first step on.
    """

    def __init__(self, runner: Runner, block_size: int) -> None:
        self.mixtures = MixtureStates(runner)
        self._runner = runner
        self._block_size = block_size

    def build(self, scheduled: Sequence[Scheduled], slots_of: SlotsOf) -> Step:
        """Return the step as tensors."""
        for request, _ in scheduled:
            if request.mixture is not None:
                self.mixtures.begin(request, request.mixture)
        return build(scheduled, slots_of, self._block_size, self._runner.slots.table_rows, self.mixtures)

    def compute(self, scheduled: Sequence[Scheduled], slots_of: SlotsOf) -> Tensor:
        """Return logits [sample rows, V], valid until the next step. Call it before the requests' counters move."""
        step = self.build(scheduled, slots_of)
        logits = self._runner.forward(step)
        if step.routing is not None:
            self.mixtures.record(scheduled, step.routing)
        return logits


def build(
    scheduled: Sequence[Scheduled],
    slots_of: SlotsOf,
    block_size: int,
    table_rows: TableRows = MappingProxyType({}),
    mixtures: MixtureStates | None = None,
) -> Step:
    """Return the step of the scheduled requests.

    table_rows: those of every slot that has more than one (adapters/slots.py).
    mixtures: state of the requests with a mixture; the slot of a mixture's router is the last of its request's.
    """
    input_ids: list[int] = []
    starts, sample_rows, spans = [0], [], []
    to_position, to_place = [], []
    taken = _TakenRows(table_rows, mixtures)
    for request, num_tokens in scheduled:
        begin = request.num_computed_tokens
        input_ids += request.token_ids(begin, begin + num_tokens)
        first_row = starts[-1] - begin  # the row that token 0 would have
        starts.append(starts[-1] + num_tokens)
        lengths = [use.num_virtual_tokens for use in request.spans]
        spans.append(lengths)
        to_position.append(sum(lengths) - first_row)
        to_place.append(sum(-(-length // block_size) * block_size for length in lengths) - first_row)
        if begin + num_tokens == request.num_tokens:
            sample_rows.append(starts[-1] - 1)
        taken.add(request, slots_of.get(request, ()), begin, begin + num_tokens, first_row)

    positions, paging, span_experts = _paged(scheduled, starts, (to_position, to_place), spans, block_size)
    return Step(
        torch.tensor(input_ids, dtype=torch.int64),
        positions,
        torch.tensor(sample_rows, dtype=torch.int64),
        paging,
        taken.entries(torch.arange(starts[-1])),
        taken.routing(span_experts),
    )


def _paged(
    scheduled: Sequence[Scheduled],
    starts: Sequence[int],
    offsets: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]],
    block_size: int,
) -> tuple[Tensor, Paging, Tensor | None]:
    """Return the positions of the rows, their paging, and the experts that bring their spans.

    starts: first row of each request, and T. offsets: two for each request: added to a row's number, the first gives
    its position, the second its place in the request's blocks, holes included. spans: lengths, of each request.
    """
    query_start = torch.tensor(starts, dtype=torch.int32)
    rows = torch.arange(starts[-1])
    # searchsorted, because repeat_interleave wakes every thread, however little work there is.
    request_of_row = torch.searchsorted(query_start[1:], rows.int(), right=True)
    positions, places = torch.tensor(offsets)[:, request_of_row] + rows
    virtual_lens = _table(spans, torch.int32)
    log_gates = span_experts = None
    if virtual_lens.shape[1]:
        log_gates, span_experts = _span_gates(scheduled, request_of_row)
    block_tables = _table([request.virtual_blocks + request.blocks for request, _ in scheduled], torch.int32)
    block_of_row = places // block_size
    paging = Paging(
        places + (block_tables[request_of_row, block_of_row] - block_of_row) * block_size,
        query_start,
        torch.tensor([request.num_computed_tokens + count for request, count in scheduled], dtype=torch.int32),
        virtual_lens,
        block_tables,
        log_gates,
    )
    return positions, paging, span_experts


class _TakenRows:
    """Gathers which rows use which adapters, request by request."""

    def __init__(self, table_rows: TableRows, mixtures: MixtureStates | None) -> None:
        self._table_rows = table_rows
        self._mixtures = mixtures
        self._run_ends: list[int] = []  # runs of rows with the same entries
        self._entries_per_row: list[int] = []
        self._slots: list[int] = []
        self._gates: list[float] = []
        self._routed: list[RoutedRun] = []
        self._experts: list[tuple[int, list[int]]] = []  # of each routed run: first entry, and the expert of each
        self._num_traced = 0

    def add(self, request: Request, slots: tuple[AdapterSlot, ...], begin: int, end: int, first_row: int) -> None:
        """Add the tokens begin : end of a request; token n is row first_row + n."""
        if not request.adapters and request.mixture is None:
            self._run_ends.append(first_row + end)
            self._entries_per_row.append(0)
            return
        uses = [
            (self._table_rows.get(slot, (slot,)), use)
            for slot, use in zip(slots[: len(request.adapters)], request.adapters, strict=True)
            if not use.num_virtual_tokens
        ]
        first_entry = len(self._slots)
        for first, last, acting in token_ranges.runs([use.ranges for _, use in uses], begin, end):
            of_row = [
                (table_row, use.gate) for table_rows, use in map(uses.__getitem__, acting) for table_row in table_rows
            ]
            self._run_ends.append(first_row + last)
            self._entries_per_row.append(len(of_row))
            self._slots += [table_row for table_row, _ in of_row] * (last - first)
            self._gates += [gate for _, gate in of_row] * (last - first)
        if request.mixture is not None:
            experts = experts_of(request, [use for table_rows, use in uses for _ in table_rows])
            self._experts.append((first_entry, experts * (end - begin)))
            self._route(request, request.mixture, slots[-1], first_row + begin, first_row + end)

    def _route(self, request: Request, mixture: MixtureUse, router: AdapterSlot, first: int, last: int) -> None:
        """Add the rows first : last of a request with a mixture, whose gates `router` makes."""
        assert self._mixtures is not None
        state = self._mixtures.of[request]
        is_traced = mixture.gate_detail is not GateDetail.NONE
        self._routed.append(
            RoutedRun(
                first=first,
                last=last,
                slot=router,
                spans=tuple(experts_of(request, request.spans)),
                pooled=state.pooled,
                steering=state.steering,
                traced_at=self._num_traced if is_traced else -1,
            )
        )
        self._num_traced += (last - first) * len(request.adapters) if is_traced else 0

    def entries(self, rows: Tensor) -> Entries | None:
        """Return the entries of the rows 0 to T - 1; None if no row has an adapter."""
        if not self._slots and not self._routed:
            return None
        run_of_row = torch.searchsorted(torch.tensor(self._run_ends), rows, right=True)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(self._entries_per_row)[run_of_row].cumsum(0)
        slots = torch.tensor(self._slots, dtype=torch.int32)
        return Entries(offsets, slots, torch.tensor(self._gates, dtype=torch.float32))

    def routing(self, span_experts: Tensor | None) -> Routing | None:
        """Return the rows whose gates routers make; None if no request has a mixture."""
        if not self._routed or self._mixtures is None:
            return None
        experts = torch.full((len(self._slots),), -1, dtype=torch.int32)
        for first, of_entries in self._experts:
            experts[first : first + len(of_entries)] = torch.tensor(of_entries, dtype=torch.int32)
        return Routing(
            tuple(self._routed),
            torch.tensor([run.row() for run in self._routed], dtype=torch.int64),
            experts,
            span_experts,
            torch.zeros(self._mixtures.num_layers, self._num_traced) if self._num_traced else None,
        )


def _span_gates(scheduled: Sequence[Scheduled], request_of_row: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return `Paging.log_gates` and `Routing.span_experts`."""
    gates = [[use.gate for use in request.spans] for request, _ in scheduled]
    are_routed = any(request.spans and request.mixture is not None for request, _ in scheduled)
    if not are_routed and all(gate == 1.0 for of_request in gates for gate in of_request):
        return None, None
    log_gates = _table([[math.log(gate) for gate in of_request] for of_request in gates], torch.float32)
    if not are_routed:
        return log_gates[request_of_row], None
    # Plus one, because tables are padded with zeros.
    experts = [[expert + 1 for expert in experts_of(request, request.spans)] for request, _ in scheduled]
    return log_gates[request_of_row], _table(experts, torch.int32)[request_of_row] - 1


def _table(lines: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Return the lines as a table [lines, length of the longest], padded with zeros."""
    width = max(map(len, lines))
    filled = [[*line, *[0] * (width - len(line))] for line in lines]
    return torch.tensor(filled, dtype=dtype).view(len(lines), width)
