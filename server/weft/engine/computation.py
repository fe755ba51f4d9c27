"""The computation of steps, and of what is left of a step that raises.

A step that raises is computed in halves until the requests that raise alone are found. It can be computed again: it
writes the same keys and values to the same places, gates of a token are recorded once, and the requests' counters move
only after success. A request that raises alone costs at most 2 · log2(n) steps more.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from weft.engine import sampler
from weft.engine.batch import SlotsOf, Stepper
from weft.engine.block_manager import BlockManager
from weft.engine.request import Request, RequestId, SampledToken, SamplingParams
from weft.engine.runner import Runner, is_lost
from weft.engine.scheduler import Scheduled
from weft.kernels.faults import is_out_of_memory

_log = logging.getLogger(__name__)

FAILURES_MAX = 8
"""Requests that may raise alone, with no step between them that succeeds, until the engine itself is examined."""

Sampled: TypeAlias = list[tuple[Request, SampledToken | None]]


class Failed(NamedTuple):
    """A part of a step that raises although it is of one request alone."""

    scheduled: Scheduled
    error: Exception

    @property
    def is_short_of_memory(self) -> bool:
        return is_out_of_memory(self.error)


class Computed(NamedTuple):
    """The parts of a step that were computed, with their tokens, and those that raise alone."""

    parts: list[Scheduled]
    sampled: Sampled
    failed: list[Failed]


class Abandoned(Exception):
    """The step ended only after the engine had been given up."""


class Computation:
    """Computes the steps of one engine.

    free_memory: called before what ran out of device memory is tried again.
    num_begun: model calls so far, those that raised too. is_abandoned: whether nothing may be computed any more.
    """

    def __init__(
        self, runner: Runner, blocks: BlockManager, slots_of: SlotsOf, free_memory: Callable[[], None]
    ) -> None:
        self.stepper = Stepper(runner, blocks.block_size)
        self.num_begun = 0
        self.is_abandoned = False
        self._runner = runner
        self._blocks = blocks
        self._slots_of = slots_of
        self._free_memory = free_memory
        self._num_failures = 0  # requests that raised alone since the last step that succeeded

    def compute(self, step: Sequence[Scheduled]) -> Computed:
        """Compute a step, and what raises of it in halves. The tokens of each part are sampled before the next part.

        What runs out of device memory is tried again after memory was freed, then in halves; a request without
        neighbours is then tried with half of its tokens, and the others wait for the next step.
        Raises Abandoned, and an error after which no further step can be computed.
        """
        done = Computed([], [], [])
        has_freed = False
        todo = [list(step)]
        while todo:
            part = todo.pop()
            try:
                sampled = self._forward(part)
            except Exception as error:
                if isinstance(error, Abandoned) or is_lost(self._runner, error):
                    raise
                for request, _ in part:
                    request.rewind()
                failed = Failed(part[0], error)
                if failed.is_short_of_memory and not has_freed:
                    has_freed = True
                    self._free_memory()
                    self._runner.free_memory()
                    todo.append(part)
                elif len(part) > 1:
                    todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                elif failed.is_short_of_memory and part[0].num_tokens > 1:
                    todo.append([part[0]._replace(num_tokens=part[0].num_tokens // 2)])
                else:
                    _log.error("engine: a request fails its step, also alone", exc_info=error)
                    done.failed.append(failed)
            else:
                self._num_failures = 0
                done.parts.extend(part)
                done.sampled.extend(sampled)
        return done

    def can_go_on(self, num_failed: int) -> bool:
        """Count requests that ended because they raise alone; return whether others may have more luck.

        After FAILURES_MAX of them, one after another, the base is tried with one token: if it raises too, the engine is
        at fault, else only the requests.
        """
        self._num_failures += num_failed
        if self._num_failures < FAILURES_MAX:
            return True
        probe = Request(request_id=RequestId(""), prompt_token_ids=(0,), params=SamplingParams())
        try:
            if self._blocks.grow(probe, 1):
                self._forward([Scheduled(probe, 1)])
            self._num_failures = 0
        except Exception:
            _log.exception("engine: %d requests failed one after another, and so does the base", self._num_failures)
            return False
        finally:
            self._blocks.release(probe)
        return True

    def _forward(self, step: Sequence[Scheduled]) -> Sampled:
        self.num_begun += 1
        logits = self.stepper.compute(step, self._slots_of)
        if self.is_abandoned:
            raise Abandoned
        requests = [scheduled.request for scheduled in step if scheduled.samples]
        if not requests:
            return []
        return list(zip(requests, sampler.sample(logits, requests, self._runner.transfer), strict=True))
