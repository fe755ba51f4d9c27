"""Decode steps that are recorded once for each shape and then replayed.

A recorded step reads its inputs from a buffer on the device that stays where it is: to replay it is to copy the step's
tensors there, in one copy, and to say go. What is recorded is whatever the device was told to do, addresses included,
so a recording serves only steps of its `StepShape`, whose outline also says where the slot table is.

Where a recorder needs proof, a step is first computed under watch, unrecorded: of every outline and size that comes.
Where memory is short the older half of the recordings goes; where that is not enough the step runs unrecorded, and the
next ones too, for a while.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.engine import padding
from weft.engine.padding import StepShape
from weft.engine.transfer import Frame, Transfer
from weft.kernels import faults, host_reads
from weft.kernels.recording import Record, Replay
from weft.kernels.step import Step, leaves, with_leaves

_log = logging.getLogger(__name__)

_RECORDINGS_MAX = 256
_PATIENCE = 256
"""Steps that run unrecorded before a recording is tried again that there was no room for: a try costs two steps."""


class _Recording(NamedTuple):
    """A step on the device: its inputs, as bytes and as the step that lies in them, and how it is computed again."""

    inputs: Tensor
    there: Step
    replay: Replay


class Graphs:
    """The recordings of one runner, least recently used first.

    compute: makes logits [rows, V] of a step whose tensors are on the device, and reads nothing of it but tensors.
    """

    def __init__(
        self,
        compute: Callable[[Step], Tensor],
        record: Record,
        transfer: Transfer,
        *,
        device: torch.device,
        first_scratch_block: int,
        block_size: int,
    ) -> None:
        self._compute = compute
        self._record = record
        self._transfer = transfer
        self._device = device
        self._first_scratch_block = first_scratch_block
        self._block_size = block_size
        self._recordings: OrderedDict[StepShape, _Recording] = OrderedDict()
        self._proven: set[StepShape] = set()
        self._num_waiting = 0  # steps that run unrecorded yet
        self._table_at: int | None = None

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def shapes(self) -> list[StepShape]:
        """What steps are recorded of, the least recently used first."""
        return list(self._recordings)

    def run(self, step: Step, shape: StepShape) -> Tensor | None:
        """The logits [number of requests, V] of a decode step of `shape`; the next step overwrites them.

        None where there is no room to record it. Raises Unrecordable, and what is fatal for the device.
        """
        self._drop_stale(shape)
        recording = self._recordings.get(shape)
        if recording is None and self._num_waiting:
            self._num_waiting -= 1
            return None
        padded = padding.pad(step, shape, first_scratch_block=self._first_scratch_block, block_size=self._block_size)
        tensors = leaves(padded)
        if recording is None:
            recording = self._make_in_what_room_there_is(padded, tensors, shape)
            if recording is None:
                return None
            self._recordings[shape] = recording
            if len(self._recordings) > _RECORDINGS_MAX:
                self._recordings.popitem(last=False)
        else:
            self._recordings.move_to_end(shape)
            self._transfer.up(tensors, recording.inputs)
        logits = recording.replay()[: step.num_rows]
        bring_trace(step, recording.there, self._transfer)
        return logits

    def _make_in_what_room_there_is(
        self, padded: Step, tensors: Sequence[Tensor], shape: StepShape
    ) -> _Recording | None:
        """A recording; at the second try with the older half of the others gone."""
        for is_last in (False, True):
            try:
                return self._make(padded, tensors, shape)
            except RuntimeError as error:  # its frames hold memory while it is handled
                if not faults.is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            if not is_last:
                for known in list(self._recordings)[: -(-len(self._recordings) // 2)]:
                    del self._recordings[known]
        self._num_waiting = _PATIENCE
        _log.warning("graphs: no room to record a step of %d rows (%s); such steps run unrecorded", shape.rows, reason)
        return None

    def _make(self, padded: Step, tensors: Sequence[Tensor], shape: StepShape) -> _Recording:
        inputs = torch.empty(Frame.of(tensors).size_bytes, dtype=torch.uint8, device=self._device)
        there = with_leaves(padded, self._transfer.up(tensors, inputs))

        def compute() -> Tensor:
            return self._compute(there)

        decided = _decided(shape)
        if self._record.needs_proof and decided not in self._proven:
            host_reads.prove(compute, self._device)
            self._proven.add(decided)
        return _Recording(inputs, there, self._record(compute))

    def _drop_stale(self, shape: StepShape) -> None:
        """Forget what was recorded with a slot table that has moved."""
        if shape.outline is None or shape.outline.table_at == self._table_at:
            return
        self._table_at = shape.outline.table_at
        for known in [known for known in self._recordings if known.outline is not None]:
            if known.outline is not None and known.outline.table_at != self._table_at:
                del self._recordings[known]


def _decided(shape: StepShape) -> StepShape:
    """All of a shape that code may branch on: where a table lies, and how wide it is, changes no more than numbers."""
    outline = None if shape.outline is None else shape.outline._replace(table_at=0)
    return shape._replace(table_width=0, outline=outline)


def bring_trace(step: Step, there: Step, transfer: Transfer) -> None:
    """Copy what mixtures made of their gates in a step that was computed as `there` to where `step` has it."""
    wanted = None if step.routing is None else step.routing.trace
    made = None if there.routing is None else there.routing.trace
    if wanted is not None and made is not None and made is not wanted:
        wanted.copy_(transfer.down(made)[:, : wanted.shape[1]])
