"""The waiting requests, in the order that gives tenants, and in each tenant its adapters, their shares. No torch here.

The order is that of virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each
tenant has a counter of the tokens computed for it, divided by its weight, and the next request is one of the tenant
with the lowest. Deviations: a token costs 1 as input and 2 as output with the model's own step as unit, cached tokens
cost nothing, and within a tenant the requests for the same adapters have a counter in the same way, as a tenant's users
differ by adapter. Requests of equal counters, and those of one share, start in order of arrival.

A tenant or share that comes back after a pause starts at the lowest counter of the active ones: time without requests
earns nothing.
"""

import itertools
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from weft.engine.request import Request, Share

_IDLE_MAX = 1024  # counters kept of what is not active

Key = TypeVar("Key", bound=Hashable)


class _Counters(Generic[Key]):
    """Virtual token counters of one level. active: number of waiting and running requests."""

    def __init__(self) -> None:
        self.served: dict[Key, float] = {}
        self.active: Counter[Key] = Counter()

    def enter(self, key: Key, beside: Iterable[Key]) -> None:
        """Count a new request. beside: the active keys whose lowest counter is the least of a new one."""
        if not self.active[key]:
            floor = min((self.served[other] for other in beside), default=0.0)
            if len(self.served) > len(self.active) + _IDLE_MAX:
                self.served = {key: served for key, served in self.served.items() if self.active[key] or served > floor}
            self.served[key] = max(self.served.get(key, 0.0), floor)
        self.active[key] += 1

    def leave(self, key: Key) -> None:
        """Forget a request that has ended; with the last of all, every counter."""
        self.active[key] -= 1
        if not self.active[key]:
            del self.active[key]
        if not self.active:
            self.served.clear()


class FairQueue:
    """Waiting requests. A request is entered once, may leave the queue and come back, and is left when it has ended."""

    def __init__(self) -> None:
        self._tenants: _Counters[str] = _Counters()
        self._shares: _Counters[Share] = _Counters()
        self._queues: dict[Share, deque[Request]] = {}
        self._arrivals = itertools.count()
        self._number: dict[Request, int] = {}  # of arrival
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Yield all, the shares in the order of their first requests."""
        for share in sorted(self._queues, key=self._rank):
            yield from self._queues[share]

    def enter(self, request: Request) -> None:
        """Add a new request."""
        share = request.share
        self._tenants.enter(share.tenant, self._tenants.active.keys())
        self._shares.enter(share, (one for one in self._shares.active if one.tenant == share.tenant))
        self._number[request] = next(self._arrivals)
        self._queues.setdefault(share, deque()).append(request)
        self._length += 1

    def leave(self, request: Request, *, is_waiting: bool) -> None:
        """Forget a request that has ended."""
        if is_waiting:
            self._queues[request.share].remove(request)
            self._shrink(request.share)
        del self._number[request]
        self._tenants.leave(request.share.tenant)
        self._shares.leave(request.share)

    def pop(self) -> Request:
        """Remove and return the request whose turn it is."""
        share = min(self._queues, key=self._rank)
        request = self._queues[share].popleft()
        self._shrink(share)
        return request

    def put_back(self, request: Request) -> None:
        """Put a request at the head of its share, because it was preempted or could not start."""
        self._queues.setdefault(request.share, deque()).appendleft(request)
        self._length += 1

    def first_without(self, shares: Collection[Share]) -> Request | None:
        """Return the next request of a share that is none of `shares`."""
        others = [share for share in self._queues if share not in shares]
        return self._queues[min(others, key=self._rank)][0] if others else None

    def charge(self, request: Request, num_tokens: int) -> None:
        """Count tokens that were computed for a request."""
        cost, share = num_tokens / request.weight, request.share
        self._tenants.served[share.tenant] += cost
        self._shares.served[share] += num_tokens

    def _rank(self, share: Share) -> tuple[float, float, int]:
        head = self._queues[share][0]
        return self._tenants.served[share.tenant], self._shares.served[share], self._number[head]

    def _shrink(self, share: Share) -> None:
        self._length -= 1
        if not self._queues[share]:
            del self._queues[share]
