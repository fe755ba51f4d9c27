"""Decode steps, captured once for each shape and then replayed.

A captured step reads its inputs from a buffer on the device that stays where it is: a replay is one copy of the step's
tensors there, and one call. A capture contains addresses, so it serves only steps of its `StepShape`, whose key has the
address of the slot table.

If a capture needs proof, a step of each new key and size first runs once under watch, uncaptured. If memory is short,
the older half of the captures is dropped; if that is not enough, this step and those after it run uncaptured for a
while.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from weft.engine.capture.shapes import StepShape, pad
from weft.kernels import faults, host_reads
from weft.kernels.capture import Capture, Replay
from weft.kernels.device import Frame, Transfer
from weft.kernels.step import Step, leaves, with_leaves

_log = logging.getLogger(__name__)

_CAPTURES_MAX = 256
_PATIENCE = 256
"""Steps that run uncaptured before a capture without room is tried again: a try costs as much as two steps."""


class _Captured(NamedTuple):
    """A step on the device: its inputs, as bytes and as a step whose tensors are views of them, and its replay."""

    inputs: Tensor
    there: Step
    replay: Replay


class CapturedSteps:
    """The captured steps of one runner: `shapes` has each by its shape, least recently used first.

    compute: makes logits [rows, V] of a step on the device, and reads nothing but its tensors.
    """

    def __init__(
        self,
        compute: Callable[[Step], Tensor],
        capture: Capture,
        transfer: Transfer,
        *,
        device: torch.device,
        first_scratch_block: int,
        block_size: int,
    ) -> None:
        self._compute = compute
        self._capture = capture
        self._transfer = transfer
        self._device = device
        self._first_scratch_block = first_scratch_block
        self._block_size = block_size
        self.shapes: OrderedDict[StepShape, _Captured] = OrderedDict()
        self._proven: set[StepShape] = set()
        self._num_waiting = 0  # steps that still run uncaptured
        self._table_at: int | None = None

    def run(self, step: Step, shape: StepShape) -> Tensor | None:
        """Return the logits [number of requests, V] of a decode step of `shape`; the next step overwrites them.

        None if there is no room to capture it. Raises NotCapturable, and errors that are fatal for the device.
        """
        self._drop_stale(shape)
        captured = self.shapes.get(shape)
        if captured is None and self._num_waiting:
            self._num_waiting -= 1
            return None
        padded = pad(step, shape, first_scratch_block=self._first_scratch_block, block_size=self._block_size)
        tensors = leaves(padded)
        if captured is None:
            captured = self._make_within_memory(padded, tensors, shape)
            if captured is None:
                return None
            self.shapes[shape] = captured
            if len(self.shapes) > _CAPTURES_MAX:
                self.shapes.popitem(last=False)
        else:
            self.shapes.move_to_end(shape)
            self._transfer.to_device(tensors, captured.inputs)
        logits = captured.replay()[: step.num_rows]
        bring_trace(step, captured.there, self._transfer)
        return logits

    def drop_all(self) -> None:
        """Free the memory of all captures; steps run uncaptured for a while."""
        self.shapes.clear()
        self._num_waiting = _PATIENCE

    def _make_within_memory(self, padded: Step, tensors: Sequence[Tensor], shape: StepShape) -> _Captured | None:
        """Capture a step; the second try is made without the older half of the others."""
        for is_last in (False, True):
            try:
                return self._make(padded, tensors, shape)
            except RuntimeError as error:  # its frames hold memory until this block ends
                if not faults.is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            if not is_last:
                for known in list(self.shapes)[: -(-len(self.shapes) // 2)]:
                    del self.shapes[known]
        self._num_waiting = _PATIENCE
        _log.warning("capture: no room for a step of %d rows (%s); such steps run uncaptured", shape.rows, reason)
        return None

    def _make(self, padded: Step, tensors: Sequence[Tensor], shape: StepShape) -> _Captured:
        inputs = torch.empty(Frame.of(tensors).size_bytes, dtype=torch.uint8, device=self._device)
        there = with_leaves(padded, self._transfer.to_device(tensors, inputs))
        compute = partial(self._compute, there)
        # What code may branch on: a table's address and width change numbers alone.
        key = None if shape.key is None else shape.key._replace(table_at=0)
        branch = shape._replace(table_width=0, key=key)
        if self._capture.needs_proof and branch not in self._proven:
            host_reads.prove(compute, self._device)
            self._proven.add(branch)
        return _Captured(inputs, there, self._capture(compute))

    def _drop_stale(self, shape: StepShape) -> None:
        """Drop the captures made with a slot table that has moved."""
        if shape.key is None or shape.key.table_at == self._table_at:
            return
        self._table_at = shape.key.table_at
        for known in [one for one in self.shapes if one.key is not None and one.key.table_at != self._table_at]:
            del self.shapes[known]


def bring_trace(step: Step, there: Step, transfer: Transfer) -> None:
    """Copy the gates that mixtures traced on the device, in `there`, to the host, in `step`."""
    wanted = None if step.routing is None else step.routing.trace
    made = None if there.routing is None else there.routing.trace
    if wanted is not None and made is not None and made is not wanted:
        wanted.copy_(transfer.to_host(made)[:, : wanted.shape[1]])
