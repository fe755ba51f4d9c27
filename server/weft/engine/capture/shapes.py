"""Pad decode steps of similar size to the same shape, so that one capture serves them all.

A *decode step* has one row for each request, and every row samples. Padding rows come after the real ones: they have no
adapters, store their keys in scratch blocks that no request owns, see one position there, and their logits are never
read. Padding entries belong to the last row, with the last entry's slot and gate 0, which adds nothing, and to no
expert. Padding runs of mixtures have no rows. The unused columns of a block table or a trace are never read.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.kernels.slot_tables import CaptureKey
from weft.kernels.step import Entries, Paging, Routing, Step, lone_request

_TABLE_WIDTHS = (16, 64)  # of steps that are common: up to 1,024 tokens in blocks of 16
_SPACED = 16  # from here on there is a size between two powers of two


class StepShape(NamedTuple):
    """What a step is captured for; steps of the same shape differ in the contents of their tensors alone.

    entries: room for entries of adapter rows; 0 if no row has any. key: of the slot tables; None if no row has an
    adapter. runs: room for requests with a mixture. traced: room for gates in a layer of their trace.
    """

    rows: int
    table_width: int
    spans: int
    has_log_gates: bool
    entries: int
    key: CaptureKey | None
    runs: int = 0
    traced: int = 0
    has_span_experts: bool = False


def shape_of(step: Step, key: CaptureKey | None) -> StepShape | None:
    """Return the shape that a step is padded to; None if it is no decode step. key: None if no row has an adapter."""
    paging, entries, routing = step.paging, step.entries, step.routing
    if not step.samples_all or len(paging.context_lens) != step.num_rows:
        return None
    size = step_size(step.num_rows)
    num_entries = 0 if entries is None else len(entries.slots)
    trace = None if routing is None else routing.trace
    return StepShape(
        rows=size,
        table_width=_table_width(paging.block_tables.shape[1]),
        spans=_power_of_two(paging.virtual_lens.shape[1]),
        has_log_gates=paging.log_gates is not None,
        entries=max(size, step_size(num_entries)) if num_entries else 0,
        key=key,
        runs=0 if routing is None else _power_of_two(len(routing.table)),
        traced=0 if trace is None else _power_of_two(trace.shape[1]),
        has_span_experts=routing is not None and routing.span_experts is not None,
    )


def common_shapes(num_rows_max: int) -> list[StepShape]:
    """Return the shapes that every server needs, the largest first: the base alone, with contexts of usual length."""
    return [
        StepShape(rows=rows, table_width=width, spans=0, has_log_gates=False, entries=0, key=None)
        for rows in reversed(step_sizes(num_rows_max))
        for width in reversed(_TABLE_WIDTHS)
    ]


def probe(token_id: int, position: int, block: int, block_size: int) -> Step:
    """Return the decode step of a single request in one block: its token at `position` sees those before it."""
    place = torch.tensor([block * block_size + position])
    paging = lone_request(place, [block], position + 1)
    return Step(torch.tensor([token_id]), torch.tensor([position]), torch.tensor([0]), paging)


def step_size(num_rows: int) -> int:
    """Return how many rows a decode step is padded to: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 and so on."""
    size = _power_of_two(num_rows)
    between = size * 3 // 4
    return between if between >= num_rows and between > _SPACED else size


def step_sizes(num_rows_max: int) -> list[int]:
    """Return every size of steps of up to `num_rows_max` rows, rising."""
    return sorted({step_size(num_rows) for num_rows in range(1, num_rows_max + 1)})


def num_scratch_blocks(num_rows_max: int, block_size: int) -> int:
    """Return how many blocks the padding rows of a step of up to `num_rows_max` rows need, one place for each row."""
    return -(-step_size(num_rows_max) // block_size)


def pad(step: Step, shape: StepShape, *, first_scratch_block: int, block_size: int) -> Step:
    """Return the step with the rows, entries, spans and table columns of `shape` (see `shape_of`)."""
    missing = shape.rows - step.num_rows
    scratch = torch.arange(missing)
    new_spans = shape.spans - step.paging.virtual_lens.shape[1]
    around_spans = (0, new_spans, 0, missing)
    return Step(
        F.pad(step.input_ids, (0, missing)),
        F.pad(step.positions, (0, missing)),
        torch.arange(shape.rows),
        _pad_paging(step.paging, shape, around_spans, first_scratch_block * block_size + scratch, block_size),
        None if step.entries is None else _pad_entries(step.entries, shape, missing),
        None if step.routing is None else _pad_routing(step.routing, shape, around_spans),
    )


def _pad_paging(
    paging: Paging, shape: StepShape, around_spans: tuple[int, int, int, int], scratch: Tensor, block_size: int
) -> Paging:
    """Pad the paging. around_spans: the spans and rows to add, as F.pad takes them. scratch: KV slots of added rows."""
    kv_slots, _, context_lens, virtual_lens, block_tables, log_gates = paging
    num_rows, missing = len(kv_slots), len(scratch)
    tables = F.pad(block_tables, (0, shape.table_width - block_tables.shape[1], 0, missing))
    tables[num_rows:, 0] = scratch // block_size
    return Paging(
        torch.cat([kv_slots, scratch]),
        torch.arange(shape.rows + 1, dtype=torch.int32),
        F.pad(context_lens, (0, missing), value=1),
        F.pad(virtual_lens, around_spans),
        tables,
        None if log_gates is None else F.pad(log_gates, around_spans),
    )


def _pad_entries(entries: Entries, shape: StepShape, missing: int) -> Entries:
    offsets, slots, gates = entries
    unused = shape.entries - len(slots)
    offsets = torch.cat([offsets, offsets[-1:].expand(missing)])
    offsets[-1] = shape.entries
    return Entries(offsets, torch.cat([slots, slots[-1:].expand(unused)]), F.pad(gates, (0, unused)))


def _pad_routing(routing: Routing, shape: StepShape, around_spans: tuple[int, int, int, int]) -> Routing:
    table, experts, span_experts, trace = routing.table, routing.experts, routing.span_experts, routing.trace
    no_rows = torch.tensor([shape.rows, shape.rows, int(table[-1, 2]), 0, 0, -1])
    return routing._replace(
        table=torch.cat([table, no_rows.expand(shape.runs - len(table), -1)]),
        experts=F.pad(experts, (0, shape.entries - len(experts)), value=-1),
        span_experts=None if span_experts is None else F.pad(span_experts, around_spans, value=-1),
        trace=None if trace is None else F.pad(trace, (0, shape.traced - trace.shape[1])),
    )


def _table_width(num_blocks: int) -> int:
    """Return a width for block tables. Widths grow fourfold: empty columns cost little, another capture costs more."""
    width = _TABLE_WIDTHS[0]
    while width < num_blocks:
        width *= 4
    return width


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
