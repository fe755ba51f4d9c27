"""One step as flat tensors: records that the batch builder makes and every driver, kernel and capture reads.

A step has T rows, request after request; each request's rows are a run of consecutive tokens. Shapes: B requests, at
most S spans of virtual positions per request, N entries of adapters, R runs of rows whose gates a router makes, L
layers, G gates in one layer of the trace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from weft.methods.mixture import NO_BOUNDS, Steering


class Paging(NamedTuple):
    """The rows of each request, and the places of keys and values in the pool (model/paged_attention.py).

    kv_slots: int64 [T], contiguous: where each row's key and value are stored, block · block_size + offset.
    query_start: int32 [B + 1], from 0: request b has the rows query_start[b] : query_start[b + 1], and these are its
        last real tokens.
    context_lens: int32 [B]: real tokens of the request in the pool once this step's are stored.
    virtual_lens: int32 [B, S]: positions in each virtual span, 0 past the request's last; S may be 0. Each span fills
        the next ceil(length / block_size) blocks of the table; the rest of its last block is a hole. Real token 0
        begins the block after all of them.
    block_tables: int32 [B, any], contiguous: the blocks of each request in order. Columns past its last block are never
        read, nor are holes, nor what lies before every query's sliding window.
    log_gates: float32 [T, S], contiguous, read again in each layer: added to a row's scores of a span. At -inf the row
        does not see the span, whatever it holds. None if all are 0.
    """

    kv_slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    virtual_lens: Tensor
    block_tables: Tensor
    log_gates: Tensor | None = None


class Entries(NamedTuple):
    """The adapters that each row uses, and how much of each: row t has the entries offsets[t] : offsets[t + 1].

    offsets: int32 [T + 1], rising from 0. Entries from offsets[T] on belong to no row.
    slots: int32 [N]: rows of the slot table (adapters/slots.py).
    gates: float32 [N]; an entry of gate 0 adds nothing, whatever its weights hold. The gates of a mixture's rows are
        those of the layer being computed.
    """

    offsets: Tensor
    slots: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRun:
    """The rows of one request whose gates a router makes.

    first, last: rows of the step, half-open. slot: of the router.
    spans: which expert provides each span of the request's virtual positions.
    pooled: float32 [hidden], read by the router instead of the rows, or None.
    steering: float32 [3, experts]: whether allowed (1 or 0), floor, ceiling; or None. Both are on the device.
    traced_at: where the rows' gates lie in a layer of the trace; -1 if they are not traced.
    """

    first: int
    last: int
    slot: int
    spans: tuple[int, ...]
    pooled: Tensor | None
    steering: Tensor | None
    traced_at: int

    def row(self) -> list[int]:
        """Return the run's row of `Routing.table`."""
        addresses = (0 if given is None else given.data_ptr() for given in (self.steering, self.pooled))
        return [self.first, self.last, self.slot, *addresses, self.traced_at]

    @property
    def bounds(self) -> Steering:
        """`steering` in the form that the mathematics takes."""
        return NO_BOUNDS if self.steering is None else Steering(self.steering[0] > 0, *self.steering[1:])


class Routing(NamedTuple):
    """The rows whose gates routers make, layer by layer.

    runs: one for each request with a mixture, on the host.
    table: int64 [R, 6], `runs` as kernels read them: first, last, slot, address of the steering, address of what is
        pooled (0 for none), traced_at.
    experts: int32 [N]: which expert an entry is; -1 if its gate stays.
    span_experts: int32 [T, S]: which expert provides a row's span, or -1; None if no expert provides any. The
        logarithms of those experts' gates go into `Paging.log_gates`.
    trace: float32 [L, G], written by the drivers: for each traced run its rows' gates, [rows, experts]; None if no run
        is traced.
    """

    runs: tuple[RoutedRun, ...]
    table: Tensor
    experts: Tensor
    span_experts: Tensor | None = None
    trace: Tensor | None = None


class Step(NamedTuple):
    """The inputs of one step.

    input_ids: int64 [T]. positions: int64 [T]; virtual positions count.
    sample_rows: int64 [number of requests that sample].
    entries: None if no row has an adapter. routing: None if no row belongs to a mixture.
    """

    input_ids: Tensor
    positions: Tensor
    sample_rows: Tensor
    paging: Paging
    entries: Entries | None = None
    routing: Routing | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def samples_all(self) -> bool:
        """Whether every row samples, as in a step of decode rows alone."""
        return len(self.sample_rows) == len(self.input_ids)


_Record = TypeVar("_Record", Step, Paging, Entries, Routing)


def leaves(step: Step) -> list[Tensor]:
    """Return every tensor that kernels read or write, in a fixed order."""
    records = (step, step.paging, step.entries or (), step.routing or ())
    return [field for record in records for field in record if isinstance(field, Tensor)]


def with_leaves(step: Step, tensors: Iterable[Tensor]) -> Step:
    """Return the step with its tensors replaced by these, in the order of `leaves`."""
    rest = iter(tensors)

    def moved(record: _Record) -> _Record:
        return record._make(next(rest) if isinstance(field, Tensor) else field for field in record)

    with_own = moved(step)
    return with_own._replace(
        paging=moved(step.paging),
        entries=None if step.entries is None else moved(step.entries),
        routing=None if step.routing is None else moved(step.routing),
    )


def lone_request(kv_slots: Tensor, blocks: Sequence[int], num_context: int) -> Paging:
    """Return the paging of a step that has one request without virtual positions and stores its rows at `kv_slots`."""
    device = kv_slots.device
    return Paging(
        kv_slots,
        torch.tensor([0, len(kv_slots)], dtype=torch.int32, device=device),
        torch.tensor([num_context], dtype=torch.int32, device=device),
        torch.zeros(1, 0, dtype=torch.int32, device=device),
        torch.tensor([list(blocks)], dtype=torch.int32, device=device),
    )


def row_of_entry(entries: Entries) -> Tensor:
    """Return the row of each entry: int32 [N]; T if it belongs to none."""
    numbers = torch.arange(len(entries.slots), dtype=torch.int32, device=entries.slots.device)
    return torch.searchsorted(entries.offsets[1:], numbers, right=True, out_int32=True)


def entries_at(entries: Entries, rows: Tensor) -> tuple[Entries, Tensor]:
    """Return the entries of some rows as if these rows were the step, and where they lie in `entries`: int64 [N].

    rows: int64, rising. The number of operations is fixed, whatever the step. The gates are copies.
    """
    offsets = entries.offsets.long()
    starts = offsets[rows]
    kept = torch.zeros(len(rows) + 1, dtype=torch.int64)
    kept[1:] = (offsets[rows + 1] - starts).cumsum(0)
    places = torch.arange(int(kept[-1]))
    places += (starts - kept[:-1])[torch.searchsorted(kept[1:], places, right=True)]
    return Entries(kept.int(), entries.slots[places], entries.gates[places]), places


def shown(given: Tensor) -> str:
    """Describe a tensor in an error about an argument."""
    return f"{given.dtype} {list(given.shape)} with strides {given.stride()} on {given.device}"
