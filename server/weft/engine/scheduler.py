"""The scheduler: chooses the requests of the next step and how many tokens each computes. No torch here.

There is no prefill phase and no decode phase: a request has tokens, some of them computed, and each step lets it catch
up under one token budget. (The idea is vLLM V1's.) Running requests come first, in the order in which they started.
Waiting ones follow in the order of engine/fair_queue.py, except those whose adapters are still being loaded. A request
starts only if the pool has room for all its tokens, so a long prompt never begins what it cannot finish. If the pool
runs short later, the youngest running request is preempted: it gives its blocks back, and recomputes them later.

If all places of the batch are taken and a share of the server has none, the youngest request of the share with the most
gives its place up. It finds its blocks in the prefix cache again, so this costs it little more than the time.

Other requests may overtake one that waits for adapter room, but not forever. After OVERTAKEN_MAX of them none starts
before it, so that running requests end and make room.
"""

from collections import Counter
from typing import NamedTuple, Protocol

from weft.engine.block_manager import BlockManager
from weft.engine.fair_queue import FairQueue
from weft.engine.request import Request, RequestStatus

OVERTAKEN_MAX = 64


class Scheduled(NamedTuple):
    """The next `num_tokens` of `request`, from its first uncomputed one."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this step reaches the request's last token, from whose row the next one is sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens


class AdapterHolds(Protocol):
    """Decides whether the adapters of a request let it start (`Residency`)."""

    def admit(self, request: Request) -> bool:
        """Hold every adapter of the request; False if a later step must try again."""
        ...

    def is_loading(self, request: Request) -> bool:
        """Return whether the request waits for a load rather than for room."""
        ...


class Scheduler:
    """The waiting and the running requests; called only on the engine thread.

    blocked: the waiting request that no other may overtake any more, if the last `schedule` met one.
    """

    def __init__(
        self, blocks: BlockManager, holds: AdapterHolds, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._holds = holds
        self.blocked: Request | None = None
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.enter(request)

    def remove(self, request: Request) -> None:
        """Remove a finished request and release its blocks."""
        is_running = request in self.running
        if is_running:
            self.running.remove(request)
        self.waiting.leave(request, is_waiting=not is_running)
        self.blocks.release(request)

    def schedule(self) -> list[Scheduled]:
        """Return the next step, in the order of its rows; empty if nothing can run now."""
        self.blocked = None
        budget = self._max_num_batched_tokens
        step: list[Scheduled] = []
        if len(self.running) >= self._max_num_seqs and len(self.waiting):
            self._make_place()
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            if not self._make_room(request, num_tokens):
                break  # the request itself was the youngest, and was preempted
            step.append(Scheduled(request, num_tokens))
            budget -= num_tokens
            index += 1
        if len(self.waiting) and budget > 0:
            step.extend(self._start_waiting(budget))
        return step

    def advance(self, step: list[Scheduled]) -> None:
        """Count the tokens of a computed step, and share the blocks that are now full."""
        for scheduled in step:
            request, num_tokens = scheduled
            self.waiting.charge(request, num_tokens + scheduled.samples)
            request.num_computed_tokens += num_tokens
            self.blocks.commit(request)

    def preempt_others(self, request: Request) -> None:
        """Preempt every running request but this one, for what else they hold."""
        for other in reversed(self.running.copy()):
            if other is not request:
                self._preempt(other)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        while not self.blocks.grow(request, request.num_computed_tokens + num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Put a request back at the head of its share, with its adapters but without its blocks: it is recomputed."""
        self.running.remove(request)
        self.blocks.release(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.put_back(request)
        self.num_preemptions += 1

    def _make_place(self) -> None:
        """Preempt one request, if a share that has no place can start at once and another one has several."""
        places = Counter(request.share for request in self.running)
        entrant = self.waiting.first_without(places)
        share, most = places.most_common(1)[0]
        if entrant is not None and most > 1 and self._holds.admit(entrant):
            self._preempt(next(request for request in reversed(self.running) if request.share == share))

    def _start_waiting(self, budget: int) -> list[Scheduled]:
        started: list[Scheduled] = []
        skipped: list[Request] = []
        without_room: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            self.blocked = next((passed for passed in without_room if passed.num_overtaken >= OVERTAKEN_MAX), None)
            if self.blocked is not None:
                break
            request = self.waiting.pop()
            if not self._holds.admit(request):
                skipped.append(request)
                if not self._holds.is_loading(request):
                    without_room.append(request)
                continue
            num_cached, num_tokens = self.blocks.match(request), request.num_tokens
            if not self.blocks.grow(request, num_tokens):
                self.blocks.release(request)
                skipped.append(request)
                break
            num_tokens = min(num_tokens - num_cached, budget)
            request.num_computed_tokens = num_cached
            if request.status is RequestStatus.WAITING:  # a preempted request finds its own blocks in the cache
                request.num_cached_tokens = num_cached
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            started.append(Scheduled(request, num_tokens))
            budget -= num_tokens
            for passed in without_room:
                passed.num_overtaken += 1
        for request in reversed(skipped):
            self.waiting.put_back(request)
        return started
