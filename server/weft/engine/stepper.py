"""Compute one step, from the scheduled requests to logits, for the engine, test drivers and benchmarks alike."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from weft.adapters.slots import AdapterSlot
from weft.engine import batch
from weft.engine.mixtures import MixtureStates
from weft.engine.request import Request
from weft.engine.runner import Runner
from weft.engine.scheduler import Scheduled
from weft.kernels.step import Step

SlotsOf = Mapping[Request, tuple[AdapterSlot, ...]]


class Stepper:
    """Computes steps on a runner. mixtures: state of the requests with a mixture, from their first step on."""

    def __init__(self, runner: Runner, block_size: int) -> None:
        self.mixtures = MixtureStates(runner)
        self._runner = runner
        self._block_size = block_size

    def build(self, scheduled: Sequence[Scheduled], slots_of: SlotsOf) -> Step:
        """Return the step as tensors."""
        for request, _ in scheduled:
            if request.mixture is not None:
                self.mixtures.begin(request, request.mixture)
        return batch.build(scheduled, slots_of, self._block_size, self._runner.slots.table_rows, self.mixtures)

    def compute(self, scheduled: Sequence[Scheduled], slots_of: SlotsOf) -> Tensor:
        """Return logits [sample rows, V], valid until the next step. Call it before the requests' counters move."""
        step = self.build(scheduled, slots_of)
        logits = self._runner.forward(step)
        if step.routing is not None:
            self.mixtures.record(scheduled, step.routing)
        return logits
