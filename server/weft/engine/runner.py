"""The one model call of a step.

Everything above (scheduler, sampler, streams) meets the model only through `Runner`; tests put a scripted one here.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from weft.adapters.slots import SlotTable
from weft.engine.capture.captured import CapturedSteps, bring_trace
from weft.engine.capture.shapes import StepShape, common_shapes, num_scratch_blocks, probe, shape_of
from weft.engine.drivers import driver_of
from weft.errors import AdapterUnusable
from weft.kernels.capture import NotCapturable
from weft.kernels.device import Transfer, transfer_to
from weft.kernels.faults import is_fatal, is_out_of_memory
from weft.kernels.selection import Kernels
from weft.kernels.step import Step, leaves, lone_request, with_leaves
from weft.methods.protocol import SiteKind, SoftRows, Virtual, VirtualKV
from weft.model.loader import Base
from weft.model.paged_attention import KVCache, Paged, ReferenceAttend

_log = logging.getLogger(__name__)

_PROBE_STEPS = 3  # the first is captured; positions matter in the last
_CAPTURE_ERROR_MAX = 0.01


class Runner(Protocol):
    """The operations that the engine needs on the device. Only the engine thread calls them."""

    slots: SlotTable
    transfer: Transfer  # to and from the device that holds the logits
    num_layers: int

    def forward(self, step: Step) -> Tensor:
        """Compute a step; return logits [number of sample rows, V], valid until the next step.

        Writes the gates of mixtures and their trace.
        """
        ...

    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        """Return the mean of the tokens' rows of the input embedding: float32 [E], on the device of the routers."""
        ...

    def write_virtual(self, blocks: list[int], virtual: Virtual) -> None:
        """Store an adapter's virtual positions in the KV pool; soft rows go through the base alone, at 0 to P - 1.

        Raises AdapterUnusable if the result is not finite.
        """
        ...

    def is_alive(self) -> bool:
        """Return whether the device still computes; it does not after an error that spoiled its memory."""
        ...

    def free_memory(self) -> None:
        """Free the device memory that the runner can do without."""
        ...


def is_lost(runner: Runner, error: BaseException) -> bool:
    """Return whether no later step can be trusted; if the error does not say so, the device itself is asked."""
    return is_fatal(error) or not (is_out_of_memory(error) or runner.is_alive())


class ModelRunner:
    """The real runner: a loaded base, its KV pool and its adapter slots.

    num_captured_rows: the largest decode step that is captured and replayed, if the kernels can be captured.
    """

    def __init__(
        self,
        base: Base,
        *,
        num_kv_blocks: int,
        block_size: int,
        adapter_bytes: int,
        kernels: Kernels,
        num_captured_rows: int = 0,
    ) -> None:
        self.transfer = transfer_to(base.device)
        self.num_layers = base.shape.num_layers
        self.slots = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=adapter_bytes, device=base.device)
        self._base = base
        self._heads = [site.index for site in base.shape.of_kind(SiteKind.HEAD)]
        self._kernels = kernels
        self._num_captured_rows = num_captured_rows if kernels.capture is not None else 0
        num_scratch = num_scratch_blocks(self._num_captured_rows, block_size)
        self._cache = KVCache.allocate(
            base.shape,
            num_blocks=num_kv_blocks + num_scratch,
            block_size=block_size,
            dtype=base.dtype,
            device=base.device,
        )
        self._attend = (kernels.attend or ReferenceAttend)(self._cache.keys, self._cache.values)
        self._captured: CapturedSteps | None = None
        if kernels.capture is not None and num_captured_rows:
            self._captured = CapturedSteps(
                lambda there: self._compute(there, there),
                kernels.capture(),
                self.transfer,
                device=base.device,
                first_scratch_block=num_kv_blocks,
                block_size=block_size,
            )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Verify that captured steps are correct, if steps are captured at all, and capture the usual ones ahead."""
        if self._captured is None:
            return
        block, block_size = self._cache.keys[0].shape[0] - 1, self._cache.block_size
        steps = [probe(1 + place, place, block, block_size) for place in range(min(_PROBE_STEPS, block_size))]
        error = self._capture_error(steps)
        if error is None or not error < _CAPTURE_ERROR_MAX:
            if error is not None:
                _log.error("runner: captured decode steps are off by %.3g; steps run uncaptured, more slowly", error)
            self._captured = None  # a capture that cannot be verified is not used
            return
        shapes = common_shapes(self._num_captured_rows) if self._kernels.captures_ahead else []
        for done, shape in enumerate(shapes, start=1):
            if self._replay(steps[0], shape) is None:
                return
            _log.info("runner: captured decode step %d of %d, with %d rows", done, len(shapes), shape.rows)

    def _capture_error(self, steps: Sequence[Step]) -> float | None:
        """Return the relative error of the last of these steps if it is replayed as the first was captured.

        None if steps cannot be captured, or there is no room.
        """
        plain, captured = torch.empty(0), None
        for step in steps:
            plain = self._run(step).float()
        for step in steps:
            captured = self._replay(step, self._captured_shape(step))
            if captured is None:
                return None
        assert captured is not None
        return float((captured.float() - plain).norm() / plain.norm())

    @torch.inference_mode()
    def mean_embedding(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(token_ids, device=self._base.device)
        return self._base.model.get_input_embeddings()(ids).float().mean(0)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        self.slots.wait()
        logits = self._replay(step, self._captured_shape(step))
        return self._run(step) if logits is None else logits

    def _captured_shape(self, step: Step) -> StepShape | None:
        """Return the shape to capture a step as; None if it must run uncaptured."""
        if self._captured is None or step.num_rows > self._num_captured_rows:
            return None
        key = None if step.entries is None else self._kernels.capture_key(self.slots, step.entries.slots)
        return shape_of(step, key)

    def _replay(self, step: Step, shape: StepShape | None) -> Tensor | None:
        """Return the logits of a captured step; None if it must run uncaptured.

        This happens if it has no shape, if there is no room, and from then on if steps turn out not to be capturable.
        """
        if self._captured is None or shape is None:
            return None
        try:
            return self._captured.run(step, shape)
        except NotCapturable as error:
            _log.warning("runner: decode steps cannot be captured (%s); they run uncaptured, more slowly", error)
            self._captured = None
            return None

    def _run(self, step: Step) -> Tensor:
        there = with_leaves(step, self.transfer.to_device(leaves(step)))
        logits = self._compute(step, there)
        bring_trace(step, there, self.transfer)
        return logits

    def _compute(self, step: Step, there: Step) -> Tensor:
        """Return the logits of a step that is on the host as `step` and on the device as `there`.

        A decode step reads only the device copy, never from the host, so that it can be captured.
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

    def is_alive(self) -> bool:
        if self._base.device.type != "cuda":
            return True
        try:
            torch.ones(1, device=self._base.device).sum()
            torch.cuda.synchronize(self._base.device)
        except Exception as error:
            return is_out_of_memory(error)
        return True

    def free_memory(self) -> None:
        """Drop the captured steps, and give back what torch's allocator keeps; the KV pool stays as it is."""
        if self._captured is not None:
            self._captured.drop_all()
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute_virtual(self, blocks: list[int], rows: Tensor) -> None:
        """Compute the rows as real tokens of one request, which stores their keys where virtual ones are read."""
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
