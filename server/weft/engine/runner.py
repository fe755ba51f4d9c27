"""The narrow waist: one model call per step.

Everything above (scheduler, sampler, streams) meets the model only through `Runner`; tests put a scripted one here.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot, SlotTable
from weft.engine import batch as batches
from weft.engine import padding
from weft.engine.batch import AdapterRows, Batch, at_rows, entries_at
from weft.engine.graphs import Graphs, bring_trace
from weft.engine.padding import StepShape, empty, num_scratch_blocks, shape_of
from weft.engine.reference_routers import ReferenceRouters
from weft.engine.transfer import Transfer, transfer_to
from weft.errors import AdapterUnusable
from weft.kernels.recording import Unrecordable
from weft.kernels.selection import Kernels
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Site, SiteKind, SoftRows, Virtual, VirtualKV
from weft.model.loader import Base
from weft.model.paged_attention import KVCache, Paged, PagedBatch, attend_reference

_log = logging.getLogger(__name__)

_PROBE_STEPS = 3  # the first is what is recorded; in the last, positions matter
_RECORDING_ERROR_MAX = 0.01


class Runner(Protocol):
    """What the engine asks of the device. Only the engine thread calls it."""

    @property
    def slots(self) -> SlotTable:
        """Where adapters live."""
        ...

    @property
    def transfer(self) -> Transfer:
        """The way to the device that logits are on, and back."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers of the base."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Compute a step; logits [number of sample rows, V], until the next step. A mixture's gates and their trace
        are written."""
        ...

    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        """The mean of the rows of the input embedding: float32 [E], where routers read it."""
        ...

    def write_virtual(self, blocks: list[int], virtual: Virtual) -> None:
        """Store an adapter's virtual positions in the KV pool; rows go through the base alone, at 0 to P - 1.

        Raises AdapterUnusable where that makes numbers that are not finite.
        """
        ...


class ByRows(NamedTuple):
    """A driver of all rows of a step, and one of its sample rows, which are all that the output head sees.

    renew: called before the head's driver is asked, where routed gates have changed since it was made.
    """

    body: Driver
    head: Driver
    renew: Callable[[], object] | None = None

    @property
    def needs_residual(self) -> bool:
        """Whether the body does; no sublayer ends at the head."""
        return self.body.needs_residual

    @property
    def routes(self) -> bool:
        """Whether the body does; the head takes the last layer's gates."""
        return self.body.routes

    def enter(self, layer: int, hidden: Tensor) -> None:
        """A layer begins."""
        self.body.enter(layer, hidden)

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What the site's own driver makes of it."""
        if site.kind is not SiteKind.HEAD:
            return self.body.apply(site, base, x, residual)
        if self.renew is not None:
            self.renew()
        return self.head.apply(site, base, x, residual)

    def apply_group(self, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
        """The body's: the head reads nothing that others read."""
        return self.body.apply_group(sites, base, x)


class ModelRunner:
    """The real one: a loaded base, its KV pool and its adapter slots.

    num_recorded_rows: decode steps of up to so many rows are recorded and replayed, where the kernels can be recorded.
    """

    def __init__(
        self,
        base: Base,
        *,
        num_kv_blocks: int,
        block_size: int,
        adapter_bytes: int,
        kernels: Kernels,
        num_recorded_rows: int = 0,
    ) -> None:
        self.transfer = transfer_to(base.device)
        self.slots = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=adapter_bytes, device=base.device)
        self._base = base
        self._heads = [site.index for site in base.shape.of_kind(SiteKind.HEAD)]
        self._kernels = kernels
        self._num_recorded_rows = num_recorded_rows if kernels.recorder is not None else 0
        num_scratch = num_scratch_blocks(self._num_recorded_rows, block_size)
        self._cache = KVCache.allocate(
            num_layers=base.shape.num_layers,
            num_blocks=num_kv_blocks + num_scratch,
            block_size=block_size,
            num_kv_heads=base.shape.num_kv_heads,
            head_dim=base.shape.head_dim,
            dtype=base.dtype,
            device=base.device,
        )
        make_attend = kernels.attend
        self._attend = attend_reference if make_attend is None else make_attend(self._cache.keys, self._cache.values)
        self._graphs: Graphs | None = None
        if kernels.recorder is not None and num_recorded_rows:
            self._graphs = Graphs(
                lambda there: self._compute(there, there),
                kernels.recorder(),
                self.transfer,
                device=base.device,
                first_scratch_block=num_kv_blocks,
                block_size=block_size,
            )

    @property
    def num_layers(self) -> int:
        return self._base.shape.num_layers

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See that recorded steps are right, where steps are recorded at all, and record those that will come."""
        if self._graphs is None:
            return
        error = self._recording_error()
        if error is None:
            self._graphs = None  # no step is recorded that nobody could try
            return
        if not error < _RECORDING_ERROR_MAX:
            _log.error("runner: recorded decode steps are off by %.3g; steps run unrecorded, more slowly", error)
            self._graphs = None
            return
        if not self._kernels.records_ahead:
            return
        shapes = padding.common_shapes(self._num_recorded_rows)
        for done, shape in enumerate(shapes, start=1):
            if self._replay(empty(), shape) is None:
                return
            _log.info("runner: recorded %d of %d decode steps, of %d rows", done, len(shapes), shape.rows)

    def _recording_error(self) -> float | None:
        """How far a recorded step is from a plain one, on tokens and positions that it was not recorded with; relative.

        None where steps turn out not to be recordable, or have no room to be.
        """
        block, block_size = self._cache.keys[0].shape[0] - 1, self._cache.block_size
        steps = [padding.probe(1 + place, place, block, block_size) for place in range(min(_PROBE_STEPS, block_size))]
        plain, recorded = torch.empty(0), None
        for step in steps:
            plain = self._run(step).float()
        for step in steps:
            shape = self._recorded_shape(step)
            recorded = None if shape is None else self._replay(step, shape)
            if recorded is None:
                return None
        assert recorded is not None
        return float((recorded.float() - plain).norm() / plain.norm())

    @torch.inference_mode()
    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, device=self._base.device)
        return self._base.model.get_input_embeddings()(ids).float().mean(0)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        self.slots.join()
        shape = self._recorded_shape(batch)
        logits = None if shape is None else self._replay(batch, shape)
        return self._run(batch) if logits is None else logits

    def _recorded_shape(self, batch: Batch) -> StepShape | None:
        """What a step is recorded as; None where it is not to be."""
        if self._graphs is None or len(batch.input_ids) > self._num_recorded_rows:
            return None
        outline, rows, decisions = self.slots.outline, batch.adapter_rows, self._kernels.decisions
        if decisions is not None and rows is not None:
            outline = outline._replace(rank=0, choices=0, kinds=decisions(self.slots, rows.slots))
        return shape_of(batch, outline)

    def _replay(self, batch: Batch, shape: StepShape) -> Tensor | None:
        """The logits of a recorded step; None where it is to run as others do.

        That is for want of room, or from now on, where steps turn out not to be recordable.
        """
        if self._graphs is None:
            return None
        try:
            return self._graphs.run(batch, shape)
        except Unrecordable as error:
            _log.warning("runner: decode steps cannot be recorded (%s); they run as others do, more slowly", error)
            self._graphs = None
            return None

    def _run(self, batch: Batch) -> Tensor:
        there = batches.with_tensors(batch, self.transfer.up(batches.tensors(batch)))
        logits = self._compute(batch, there)
        bring_trace(batch, there, self.transfer)
        return logits

    def _compute(self, batch: Batch, there: Batch) -> Tensor:
        """Logits of a batch that is on the host as `batch` and on the device as `there`.

        Of a decode step only tensors of `there` are looked at, and none of them on the host.
        """
        paged = PagedBatch(
            cache=self._cache,
            kv_slots=there.kv_slots,
            query_start=there.query_start,
            context_lens=there.context_lens,
            virtual_lens=there.virtual_lens,
            block_tables=there.block_tables,
            log_gates=there.log_gates,
        )
        with self._base.context.use(self._driver(batch, there)):
            out = self._base.model(
                input_ids=there.input_ids[None],
                position_ids=there.positions[None],
                use_cache=False,
                logits_to_keep=0 if batch.samples_all else there.sample_rows,  # 0 keeps all
                paged=Paged(paged, self._attend),
            )
        return out.logits[0]

    @torch.inference_mode()
    def write_virtual(self, blocks: list[int], virtual: Virtual) -> None:
        match virtual:
            case VirtualKV(keys, values):
                self._cache.write_virtual(blocks, keys, values)
            case SoftRows(rows):
                self._compute_virtual(blocks, rows)

    def _compute_virtual(self, blocks: list[int], rows: Tensor) -> None:
        """One step of one request whose real tokens the rows are: its keys end up where virtual ones are read."""
        device, num_rows = self._base.device, len(rows)
        slots = self._cache.slots(blocks, num_rows)
        paged = PagedBatch(
            cache=self._cache,
            kv_slots=slots,
            query_start=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
            context_lens=torch.tensor([num_rows], dtype=torch.int32, device=device),
            virtual_lens=torch.zeros(1, 0, dtype=torch.int32, device=device),
            block_tables=torch.tensor([blocks], dtype=torch.int32, device=device),
        )
        self._base.model(
            inputs_embeds=rows[None].to(device, self._base.dtype),
            position_ids=torch.arange(num_rows, device=device)[None],
            use_cache=False,
            logits_to_keep=1,
            paged=Paged(paged, self._attend),
        )
        if not self._cache.is_finite(slots):
            raise AdapterUnusable(
                "ADAPTER_NON_FINITE", "the adapter's virtual positions make numbers that are not finite on this base"
            )

    def _driver(self, batch: Batch, there: Batch) -> Driver | None:
        host_rows, rows = batch.adapter_rows, there.adapter_rows
        if host_rows is None or rows is None:
            return None
        routers = ReferenceRouters(self.slots, rows.routing, self._base.device)
        driver = self._driver_of(rows, routers)
        if batch.samples_all or not any(self.slots.num_entries[index] for index in self._heads):
            return driver
        at_head = at_rows(host_rows, batch.sample_rows)
        if not len(at_head.slots):
            return ByRows(driver, ReferenceDriver(()))
        _, host_entries = entries_at(host_rows, batch.sample_rows)
        offsets, slots, gates, entries = self.transfer.up([at_head.offsets, at_head.slots, at_head.gates, host_entries])
        at_head = at_head._replace(offsets=offsets, slots=slots, gates=gates)
        if rows.routing is None:
            return ByRows(driver, self._driver_of(at_head, routers))
        renew = partial(torch.index_select, rows.gates, 0, entries, out=at_head.gates)
        return ByRows(driver, self._driver_of(at_head, routers, batch.sample_rows), renew)

    def _driver_of(self, rows: AdapterRows, routers: ReferenceRouters, sample_rows: Tensor | None = None) -> Driver:
        """sample_rows: which of the batch's rows these are, at the head; None for all."""
        if self._kernels.driver is not None:
            return self._kernels.driver(self.slots, rows.offsets, rows.slots, rows.gates, rows.routing)
        plain, routed = routers.split(rows.runs, sample_rows)
        of_plain = segments(self.slots, rows._replace(runs=plain), self._base.device)
        return ReferenceDriver([*of_plain, *routed], routers.routed if sample_rows is None else ())


def segments(slots: SlotTable, rows: AdapterRows, device: torch.device) -> Sequence[Segment]:
    """The batch's adapter rows as the reference driver reads them: one segment per slot."""
    grouped: dict[AdapterSlot, list[tuple[Tensor, Tensor]]] = {}
    for begin, end, run_slots, run_gates in rows.runs:
        index = torch.arange(begin, end)
        for slot, gate in zip(run_slots, run_gates, strict=True):
            grouped.setdefault(slot, []).append((index, torch.full((end - begin,), gate)))
    result = []
    for slot, parts in grouped.items():
        index, gates = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        result.append(Segment(slots.method(slot), slots.params(slot), index, gates))
    return result
