"""Flatten a scheduled step into the tensors of `kernels/step.py`.

Python works per request and per token range; work per token is vectorized.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine import token_ranges
from weft.engine.mixtures import MixtureStates, RoutedRows
from weft.engine.request import Request
from weft.engine.scheduler import Scheduled
from weft.kernels.step import Entries, Paging, Step

TableRows = Mapping[AdapterSlot, tuple[int, ...]]


def build(
    scheduled: Sequence[Scheduled],
    slots_of: Mapping[Request, tuple[AdapterSlot, ...]],
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

    offsets = to_position, to_place
    positions, paging, span_experts = _paged(scheduled, starts, offsets, spans, block_size, taken.routed)
    return Step(
        torch.tensor(input_ids, dtype=torch.int64),
        positions,
        torch.tensor(sample_rows, dtype=torch.int64),
        paging,
        taken.entries(torch.arange(starts[-1])),
        taken.routed.routing(span_experts, len(taken.slots)),
    )


def _paged(
    scheduled: Sequence[Scheduled],
    starts: Sequence[int],
    offsets: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]],
    block_size: int,
    routed: RoutedRows,
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
        log_gates, span_experts = _span_gates(scheduled, request_of_row, routed)
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
        self.routed = RoutedRows(mixtures)
        self._table_rows = table_rows
        self._run_ends: list[int] = []  # runs of rows with the same entries
        self._entries_per_row: list[int] = []
        self.slots: list[int] = []
        self._gates: list[float] = []

    def add(self, request: Request, slots: tuple[AdapterSlot, ...], begin: int, end: int, first_row: int) -> None:
        """Add the tokens begin : end of a request; token n is row first_row + n."""
        if not request.adapters and request.mixture is None:
            self._run_ends.append(first_row + end)
            self._entries_per_row.append(0)
            self.routed.spans.append(())
            return
        uses = [
            (self._table_rows.get(slot, (slot,)), use)
            for slot, use in zip(slots[: len(request.adapters)], request.adapters, strict=True)
            if not use.num_virtual_tokens
        ]
        first_entry = len(self.slots)
        for first, last, acting in token_ranges.runs([use.ranges for _, use in uses], begin, end):
            of_row = [
                (table_row, use.gate) for table_rows, use in map(uses.__getitem__, acting) for table_row in table_rows
            ]
            self._run_ends.append(first_row + last)
            self._entries_per_row.append(len(of_row))
            self.slots += [table_row for table_row, _ in of_row] * (last - first)
            self._gates += [gate for _, gate in of_row] * (last - first)
        if request.mixture is None:
            self.routed.spans.append(())
        else:
            num_table_rows = [len(table_rows) for table_rows, _ in uses]
            rows = first_row + begin, first_row + end
            self.routed.add(request, request.mixture, slots[-1], num_table_rows, rows, first_entry)

    def entries(self, rows: Tensor) -> Entries | None:
        """Return the entries of the rows 0 to T - 1; None if no row has an adapter."""
        if not self.slots and not self.routed:
            return None
        run_of_row = torch.searchsorted(torch.tensor(self._run_ends), rows, right=True)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(self._entries_per_row)[run_of_row].cumsum(0)
        slots = torch.tensor(self.slots, dtype=torch.int32)
        return Entries(offsets, slots, torch.tensor(self._gates, dtype=torch.float32))


def _span_gates(
    scheduled: Sequence[Scheduled], request_of_row: Tensor, routed: RoutedRows
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Paging.log_gates` and `Routing.span_experts`."""
    gates = [[use.gate for use in request.spans] for request, _ in scheduled]
    are_routed = any(routed.spans)
    if not are_routed and all(gate == 1.0 for of_request in gates for gate in of_request):
        return None, None
    log_gates = _table([[math.log(gate) for gate in of_request] for of_request in gates], torch.float32)
    if not are_routed:
        return log_gates[request_of_row], None
    # Plus one, because tables are padded with zeros.
    experts = [[expert + 1 for expert in of_request] for of_request in routed.spans]
    span_experts = _table(experts, torch.int32, log_gates.shape[1])[request_of_row] - 1
    return log_gates[request_of_row], span_experts


def _table(lines: Sequence[Sequence[float]], dtype: torch.dtype, width: int | None = None) -> Tensor:
    """Return the lines as a table [lines, width], padded with zeros; width: of the longest line if not given."""
    if width is None:
        width = max(map(len, lines))
    filled = [[*line, *[0] * (width - len(line))] for line in lines]
    return torch.tensor(filled, dtype=dtype).view(len(lines), width)
