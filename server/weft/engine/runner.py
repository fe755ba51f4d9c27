"""The narrow waist: one model call per step.

Everything above (scheduler, sampler, streams) meets the model only through `Runner`; tests put a scripted one here.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from weft.adapters.slots import SlotTable
from weft.engine import padding
from weft.engine.drivers import driver_of
from weft.engine.graphs import Graphs, bring_trace
from weft.engine.padding import StepShape, empty, num_scratch_blocks, shape_of
from weft.engine.transfer import Transfer, transfer_to
from weft.errors import AdapterUnusable
from weft.kernels.recording import Unrecordable
from weft.kernels.selection import Kernels
from weft.kernels.step import Step, leaves, lone_request, with_leaves
from weft.methods.protocol import SiteKind, SoftRows, Virtual, VirtualKV
from weft.model.loader import Base
from weft.model.paged_attention import KVCache, Paged, ReferenceAttend

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

    def forward(self, step: Step) -> Tensor:
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
        self._attend = (kernels.attend or ReferenceAttend)(self._cache.keys, self._cache.values)
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
    def forward(self, step: Step) -> Tensor:
        self.slots.join()
        shape = self._recorded_shape(step)
        logits = None if shape is None else self._replay(step, shape)
        return self._run(step) if logits is None else logits

    def _recorded_shape(self, step: Step) -> StepShape | None:
        """What a step is recorded as; None where it is not to be."""
        if self._graphs is None or step.num_rows > self._num_recorded_rows:
            return None
        outline, decisions = self.slots.outline, self._kernels.decisions
        if decisions is not None and step.entries is not None:
            outline = outline._replace(rank=0, choices=0, kinds=decisions(self.slots, step.entries.slots))
        return shape_of(step, outline)

    def _replay(self, step: Step, shape: StepShape) -> Tensor | None:
        """The logits of a recorded step; None where it is to run as others do.

        That is for want of room, or from now on, where steps turn out not to be recordable.
        """
        if self._graphs is None:
            return None
        try:
            return self._graphs.run(step, shape)
        except Unrecordable as error:
            _log.warning("runner: decode steps cannot be recorded (%s); they run as others do, more slowly", error)
            self._graphs = None
            return None

    def _run(self, step: Step) -> Tensor:
        there = with_leaves(step, self.transfer.up(leaves(step)))
        logits = self._compute(step, there)
        bring_trace(step, there, self.transfer)
        return logits

    def _compute(self, step: Step, there: Step) -> Tensor:
        """Logits of a step that is on the host as `step` and on the device as `there`.

        Of a decode step only tensors of `there` are looked at, and none of them on the host.
        """
        driver = driver_of(self._kernels, self.slots, step, there, self.transfer, self._heads)
        with self._base.context.use(driver):
            out = self._base.model(
                input_ids=there.input_ids[None],
                position_ids=there.positions[None],
                use_cache=False,
                logits_to_keep=0 if step.samples_all else there.sample_rows,  # 0 keeps all
                paged=Paged(there.paging, self._attend),
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
        paging = lone_request(slots, blocks, num_rows)
        self._base.model(
            inputs_embeds=rows[None].to(device, self._base.dtype),
            position_ids=torch.arange(num_rows, device=device)[None],
            use_cache=False,
            logits_to_keep=1,
            paged=Paged(paging, self._attend),
        )
        if not self._cache.is_finite(slots):
            raise AdapterUnusable(
                "ADAPTER_NON_FINITE", "the adapter's virtual positions make numbers that are not finite on this base"
            )
