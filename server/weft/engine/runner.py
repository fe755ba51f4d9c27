"""The narrow waist: one model call per step.

Everything above (scheduler, sampler, streams) meets the model only through `Runner`; tests put a scripted one here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weft.adapters.slots import AdapterSlot, SlotTable
from weft.engine.batch import AdapterRows, Batch, at_rows, entries_at
from weft.engine.reference_routers import ReferenceRouters
from weft.errors import AdapterUnusable
from weft.kernels.selection import Kernels
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Site, SiteKind, SoftRows, Virtual, VirtualKV
from weft.model.loader import Base
from weft.model.paged_attention import KVCache, Paged, PagedBatch, attend_reference


class Runner(Protocol):
    """What the engine asks of the device. Only the engine thread calls it."""

    @property
    def slots(self) -> SlotTable:
        """Where adapters live."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers of the base."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Compute a step; logits [number of sample rows, V]. A mixture's gates and their trace are written."""
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


def is_fatal(error: Exception) -> bool:
    """Device memory is not to be trusted after a CUDA error."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


class ModelRunner:
    """The real one: a loaded base, its KV pool and its adapter slots."""

    def __init__(
        self, base: Base, *, num_kv_blocks: int, block_size: int, adapter_bytes: int, kernels: Kernels
    ) -> None:
        self.slots = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=adapter_bytes, device=base.device)
        self._base = base
        self._heads = [site.index for site in base.shape.of_kind(SiteKind.HEAD)]
        self._kernels = kernels
        self._cache = KVCache.allocate(
            num_layers=base.shape.num_layers,
            num_blocks=num_kv_blocks,
            block_size=block_size,
            num_kv_heads=base.shape.num_kv_heads,
            head_dim=base.shape.head_dim,
            dtype=base.dtype,
            device=base.device,
        )
        make_attend = kernels.attend
        self._attend = attend_reference if make_attend is None else make_attend(self._cache.keys, self._cache.values)

    @property
    def num_layers(self) -> int:
        return self._base.shape.num_layers

    @torch.inference_mode()
    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, device=self._base.device)
        return self._base.model.get_input_embeddings()(ids).float().mean(0)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        device = self._base.device
        paged = PagedBatch(
            cache=self._cache,
            kv_slots=batch.kv_slots.to(device),
            query_start=batch.query_start.to(device),
            context_lens=batch.context_lens.to(device),
            virtual_lens=batch.virtual_lens.to(device),
            block_tables=batch.block_tables.to(device),
            log_gates=None if batch.log_gates is None else batch.log_gates.to(device),
        )
        with self._base.context.use(self._driver(batch, paged.log_gates)):
            out = self._base.model(
                input_ids=batch.input_ids[None].to(device),
                position_ids=batch.positions[None].to(device),
                use_cache=False,
                logits_to_keep=batch.sample_rows.to(device),
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

    def _driver(self, batch: Batch, log_gates: Tensor | None) -> Driver | None:
        rows = batch.adapter_rows
        if rows is None:
            return None
        routers = ReferenceRouters(self.slots, rows.routing, log_gates, self._base.device)
        driver = self._driver_of(rows, routers)
        if not any(self.slots.num_entries[index] for index in self._heads):
            return driver
        at_head = at_rows(rows, batch.sample_rows)
        if not len(at_head.slots):
            return ByRows(driver, ReferenceDriver(()))
        if rows.routing is None:
            return ByRows(driver, self._driver_of(at_head, routers))
        _, entries = entries_at(rows, batch.sample_rows)
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
