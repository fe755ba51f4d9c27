"""One step as flat tensors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine import token_ranges
from weft.engine.gatings import Gatings, RoutedRun, Routing
from weft.engine.request import GateSight, MixtureUse, Request
from weft.engine.scheduler import Scheduled


class AdapterRows(NamedTuple):
    """Which rows take how much of which adapter: row t takes entries offsets[t] : offsets[t + 1].

    `runs` says the same for rows with the same entries, (first row, one past the last, slots, gates), for the reference
    driver; there a slot stands for all its planes. A request is one run, or several where adapters act in some of its
    tokens only. Of a mixture's rows `gates` holds what the layer that is being computed has, from its beginning on, and
    `routing` says how they are made.
    """

    offsets: Tensor  # int32 [T + 1]
    slots: Tensor  # int32 [N]: planes
    gates: Tensor  # float32 [N]
    runs: tuple[tuple[int, int, tuple[AdapterSlot, ...], tuple[float, ...]], ...]
    routing: Routing | None = None  # None where no row belongs to a mixture


class Batch(NamedTuple):
    """The step's rows: request after request, each a run of consecutive tokens."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]; virtual positions count
    kv_slots: Tensor  # int64 [T]
    query_start: Tensor  # int32 [B + 1]
    context_lens: Tensor  # int32 [B]
    virtual_lens: Tensor  # int32 [B, S]: of each span of virtual positions; S is the most that a request has
    block_tables: Tensor  # int32 [B, max blocks]
    log_gates: Tensor | None  # float32 [T, S]: added to a row's attention scores of a span; None where all are 0
    sample_rows: Tensor  # int64 [number of requests that sample]
    adapter_rows: AdapterRows | None  # None where no row has an adapter

    @property
    def samples_all(self) -> bool:
        """Whether every row samples, as in a step of decode rows alone."""
        return len(self.sample_rows) == len(self.input_ids)


def build(
    step: Sequence[Scheduled],
    slots_of: Mapping[Request, tuple[AdapterSlot, ...]],
    block_size: int,
    planes: Mapping[AdapterSlot, tuple[int, ...]] = MappingProxyType({}),
    gatings: Gatings | None = None,
) -> Batch:
    """Flatten a step. Work here is per request and token range; the per-token parts are vectorized.

    planes: those of every slot that has more than one (adapters/slots.py).
    gatings: of the requests with a mixture, whose router's slot is the last of theirs.
    """
    input_ids: list[int] = []
    starts = [0]
    contexts, spans, sample_rows = [], [], []
    positions_from, places_from = [], []  # what a row's number is short of its position, and of its place in the blocks
    tables: list[list[int]] = []
    run_ends, entries_per_run, slots, gates, runs = [], [], [], [], []
    routed = _Routed(gatings)
    for request, num_tokens in step:
        begin = request.num_computed_tokens
        input_ids += request.token_ids(begin, begin + num_tokens)
        first_row = starts[-1] - begin
        starts.append(starts[-1] + num_tokens)
        contexts.append(begin + num_tokens)
        lengths = [use.num_virtual_tokens for use in request.spans]
        spans.append(lengths)
        positions_from.append(sum(lengths) - first_row)
        places_from.append(sum(-(-length // block_size) * block_size for length in lengths) - first_row)
        tables.append(request.virtual_blocks + request.blocks)
        if begin + num_tokens == request.num_tokens:
            sample_rows.append(starts[-1] - 1)
        if not request.adapters and request.mixture is None:
            run_ends.append(starts[-1])
            entries_per_run.append(0)
            continue
        uses = [
            (slot, use)
            for slot, use in zip(slots_of.get(request, ())[: len(request.adapters)], request.adapters, strict=True)
            if not use.num_virtual_tokens
        ]
        for first, last, acting in token_ranges.runs([use.ranges for _, use in uses], begin, begin + num_tokens):
            here = [(slot, use.gate) for slot, use in map(uses.__getitem__, acting)]
            entries = [(plane, gate) for slot, gate in here for plane in planes.get(slot, (slot,))]
            run_ends.append(first_row + last)
            entries_per_run.append(len(entries))
            if here:
                run_slots, run_gates = zip(*here, strict=True)
                runs.append((first_row + first, first_row + last, run_slots, run_gates))
                slots += [plane for plane, _ in entries] * (last - first)
                gates += [gate for _, gate in entries] * (last - first)
            if request.mixture is None:
                routed.pass_over(len(entries) * (last - first))
        if request.mixture is not None:
            counts = [len(planes.get(slot, (slot,))) for slot, _ in uses]
            routed.add(
                request,
                request.mixture,
                slots_of[request],
                counts,
                rows=(starts[-2], starts[-1]),
                index=len(tables) - 1,
            )

    query_start = torch.tensor(starts, dtype=torch.int32)
    num_spans = max(map(len, spans))
    rows = torch.arange(starts[-1])
    # By search: repeat_interleave wakes every thread, however little there is to do.
    request_of_row = torch.searchsorted(query_start[1:], rows.int(), right=True)
    positions, places = torch.tensor([positions_from, places_from])[:, request_of_row] + rows
    block_tables = _table(tables, max(map(len, tables)), torch.int32)
    block_of_row = places // block_size
    kv_slots = places + (block_tables[request_of_row, block_of_row] - block_of_row) * block_size

    log_gates, span_experts = None, None
    if num_spans and (routed.has_spans or any(use.gate != 1.0 for request, _ in step for use in request.spans)):
        by_request = [[math.log(use.gate) for use in request.spans] for request, _ in step]
        log_gates = _table(by_request, num_spans, torch.float32)[request_of_row]
    if routed.has_spans:
        following = [[expert + 1 for expert in routed.spans.get(index, ())] for index in range(len(step))]
        span_experts = _table(following, num_spans, torch.int32)[request_of_row] - 1

    adapter_rows = None
    routing = routed.routing(span_experts, log_gates)
    if slots or routing is not None:
        run_of_row = torch.searchsorted(torch.tensor(run_ends), rows, right=True)
        offsets = torch.zeros(starts[-1] + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(entries_per_run)[run_of_row].cumsum(0)
        adapter_rows = AdapterRows(
            offsets,
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(gates, dtype=torch.float32),
            tuple(runs),
            routing,
        )
    return Batch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        positions=positions,
        kv_slots=kv_slots,
        query_start=query_start,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        virtual_lens=_table(spans, num_spans, torch.int32),
        block_tables=block_tables,
        log_gates=log_gates,
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
        adapter_rows=adapter_rows,
    )


def tensors(batch: Batch) -> list[Tensor]:
    """Every tensor that kernels read or write, in a fixed order, each once."""
    rows = batch.adapter_rows
    found = [
        batch.input_ids,
        batch.positions,
        batch.kv_slots,
        batch.query_start,
        batch.context_lens,
        batch.virtual_lens,
        batch.block_tables,
        batch.sample_rows,
    ]
    found += [] if batch.log_gates is None else [batch.log_gates]
    if rows is None:
        return found
    found += [rows.offsets, rows.slots, rows.gates]
    return found if rows.routing is None else found + _tensors_of(rows.routing)


def with_tensors(batch: Batch, moved: Sequence[Tensor]) -> Batch:
    """The batch with other tensors, in the order of `tensors`."""
    rest = iter(moved)
    ids, positions, kv_slots, query_start, context_lens, virtual_lens, block_tables, sample_rows = islice(rest, 8)
    log_gates = None if batch.log_gates is None else next(rest)
    rows = batch.adapter_rows
    if rows is not None:
        rows = rows._replace(offsets=next(rest), slots=next(rest), gates=next(rest))
        if rows.routing is not None:
            rows = rows._replace(routing=_with_tensors(rows.routing, rest, log_gates))
    return Batch(
        input_ids=ids,
        positions=positions,
        kv_slots=kv_slots,
        query_start=query_start,
        context_lens=context_lens,
        virtual_lens=virtual_lens,
        block_tables=block_tables,
        log_gates=log_gates,
        sample_rows=sample_rows,
        adapter_rows=rows,
    )


def trace(batch: Batch) -> Tensor | None:
    """Where a step's mixtures write what they made; None where nobody looks."""
    rows = batch.adapter_rows
    return None if rows is None or rows.routing is None else rows.routing.trace


def _tensors_of(routing: Routing) -> list[Tensor]:
    """Those that are a mixture's alone: its log-gates are the batch's own."""
    optional = routing.span_experts, routing.trace
    return [routing.table, routing.experts, *(one for one in optional if one is not None)]


def _with_tensors(routing: Routing, rest: Iterator[Tensor], log_gates: Tensor | None) -> Routing:
    return routing._replace(
        table=next(rest),
        experts=next(rest),
        span_experts=None if routing.span_experts is None else next(rest),
        trace=None if routing.trace is None else next(rest),
        log_gates=None if routing.log_gates is None else log_gates,
    )


def _table(lines: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    """The lines, each filled up with zeros: [len(lines), width]."""
    filled = [[*line, *[0] * (width - len(line))] for line in lines]
    return torch.tensor(filled, dtype=dtype).view(len(lines), width)


class _Routed:
    """Gathers the rows of mixtures while a batch is built; work is per request, and next to none where nobody has one.

    spans: by the request's place in the step, which experts bring its virtual positions.
    """

    def __init__(self, gatings: Gatings | None) -> None:
        self._gatings = gatings
        self._runs: list[RoutedRun] = []
        self._experts: list[int] = []
        self._constant = 0  # entries of other requests since the last run
        self._traced = 0
        self.spans: dict[int, list[int]] = {}

    @property
    def has_spans(self) -> bool:
        """Whether a router gates virtual positions."""
        return any(self.spans.values())

    def pass_over(self, num_entries: int) -> None:
        """So many entries have gates of their own."""
        self._constant += num_entries

    def add(
        self,
        request: Request,
        mixture: MixtureUse,
        slots: tuple[AdapterSlot, ...],
        num_planes: list[int],
        *,
        rows: tuple[int, int],
        index: int,
    ) -> None:
        """A request of a mixture was added; each of its uses with deltas takes so many entries of every row."""
        assert self._gatings is not None
        generations = sorted(use.generation for use in request.adapters)
        taken = list(zip(slots, request.adapters, strict=False))  # the router's slot comes after those of the uses
        deltas = [(slot, generations.index(use.generation)) for slot, use in taken if not use.num_virtual_tokens]
        per_row = [expert for (_, expert), count in zip(deltas, num_planes, strict=True) for _ in range(count)]
        self._experts += [-1] * self._constant + per_row * (rows[1] - rows[0])
        self._constant = 0
        self.spans[index] = [generations.index(use.generation) for use in request.spans]
        traced_at = -1
        if mixture.sight is not GateSight.NONE:
            traced_at = self._traced
            self._traced += (rows[1] - rows[0]) * len(generations)
        self._runs.append(
            RoutedRun(
                first=rows[0],
                last=rows[1],
                slot=slots[-1],
                slots=tuple(slot for slot, _ in deltas),
                experts=tuple(expert for _, expert in deltas),
                spans=tuple(self.spans[index]),
                pooled=self._gatings.pooled(request),
                steering=self._gatings.steering(request),
                traced_at=traced_at,
            )
        )

    def routing(self, span_experts: Tensor | None, log_gates: Tensor | None) -> Routing | None:
        """What was gathered."""
        if not self._runs or self._gatings is None:
            return None
        return Routing(
            runs=tuple(self._runs),
            table=torch.tensor([run.row() for run in self._runs], dtype=torch.int64),
            experts=torch.tensor(self._experts + [-1] * self._constant, dtype=torch.int32),
            trace=torch.zeros(self._gatings.num_layers, self._traced) if self._traced else None,
            span_experts=span_experts,
            log_gates=None if span_experts is None else log_gates,
        )


def entries_at(adapter_rows: AdapterRows, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets int64 [N + 1] of some rows as if they were the batch, and where their entries are: int64 [entries]."""
    offsets = adapter_rows.offsets.long()
    starts = offsets[rows]
    kept = torch.zeros(len(rows) + 1, dtype=torch.int64)
    kept[1:] = (offsets[rows + 1] - starts).cumsum(0)
    entries = torch.arange(int(kept[-1]))
    row_of_entry = torch.searchsorted(kept[1:], entries, right=True)
    return kept, entries + (starts - kept[:-1])[row_of_entry]


def at_rows(adapter_rows: AdapterRows, rows: Tensor) -> AdapterRows:
    """The entries of some rows alone, as if those were the batch; `rows` int64 [N], rising.

    The output head sees the sample rows only. A fixed number of operations, whatever the batch. Of a mixture's rows the
    gates are those of now: who routes brings them up to date (`entries_at`).
    """
    kept, entries = entries_at(adapter_rows, rows)
    bounds = torch.tensor([run[:2] for run in adapter_rows.runs])  # [runs, 2]
    within = zip(adapter_rows.runs, torch.searchsorted(rows, bounds).tolist(), strict=True)
    runs = [(first, last, slots, gates) for (_, _, slots, gates), (first, last) in within if first < last]
    return AdapterRows(kept.int(), adapter_rows.slots[entries], adapter_rows.gates[entries], tuple(runs))
