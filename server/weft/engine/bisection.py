"""Bisection of a step that raises: its requests are computed in halves until those that raise alone are found.

A step can be computed again: it writes the same keys and values to the same places, gates of a token are recorded once,
and the requests' counters move only after success. A request that raises alone costs at most 2 · log2(n) steps more.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from weft.engine.request import Request, SampledToken
from weft.engine.scheduler import Scheduled
from weft.kernels.faults import is_out_of_memory

Sampled: TypeAlias = list[tuple[Request, SampledToken | None]]


class Failed(NamedTuple):
    """A part of a step that raises although it is alone: `error` is of one request."""

    scheduled: Scheduled
    error: Exception


class Bisected(NamedTuple):
    """The parts of a step that were computed, with their tokens, and those that raise alone."""

    computed: list[Scheduled]
    sampled: Sampled
    failed: list[Failed]


def bisect(
    step: Sequence[Scheduled],
    compute: Callable[[Sequence[Scheduled]], Sampled],
    contain: Callable[[Exception], None],
    free_memory: Callable[[], None],
) -> Bisected:
    """Compute a step, and what raises of it in halves. After each half its tokens are sampled.

    contain: called with each error; raises it if no further step can be computed.
    free_memory: called once, before what ran out of device memory is tried again; a request without neighbours is then
        tried with half of its tokens, and the others wait for the next step.
    """
    done = Bisected([], [], [])
    has_freed = False
    todo = [list(step)]
    while todo:
        part = todo.pop()
        try:
            sampled = compute(part)
        except Exception as error:
            contain(error)
            for request, _ in part:
                request.rewind()
            is_short = is_out_of_memory(error)
            (scheduled, *others), half = part, len(part) // 2
            if is_short and not has_freed:
                has_freed = True
                free_memory()
                todo.append(part)
            elif others:
                todo += [part[half:], part[:half]]
            elif is_short and scheduled.num_tokens > 1:
                todo.append([scheduled._replace(num_tokens=scheduled.num_tokens // 2)])
            else:
                done.failed.append(Failed(scheduled, error))
        else:
            done.computed.extend(part)
            done.sampled.extend(sampled)
    return done
