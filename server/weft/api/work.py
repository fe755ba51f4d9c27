"""Work beside the event loop: threads in pools, tasks that outlive their caller, one lock per adapter id."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from weft.adapters.identifiers import AdapterId
from weft.errors import Unavailable, draining_error
from weft.model import threads

T = TypeVar("T")


class Work:
    """Threads, tasks and locks of one server, beside its event loop.

    Each kind of work has threads of its own, so that none waits behind another: a request's load would wait for a copy
    of many files.
    loads: reads adapters for requests. changes: changes the store. prompts: tokenizes.
    """

    def __init__(self) -> None:
        self.loads = _pool("weft-loads")
        self.changes = _pool("weft-changes")
        self.prompts = _pool("weft-prompts")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._locks: WeakValueDictionary[AdapterId, asyncio.Lock] = WeakValueDictionary()
        self._refusal: Unavailable | None = None
        self.is_closed = False

    def refuse(self, error: Unavailable) -> None:
        """Refuse new work with `error`; work that has begun continues."""
        self._refusal = error

    def require_open(self) -> None:
        """Raise the error given to `refuse`, if any."""
        if self._refusal is not None:
            raise self._refusal

    @property
    def is_open(self) -> bool:
        return self._refusal is None

    async def close(self) -> None:
        """Cancel all work; callers that await it get DRAINING."""
        self.refuse(self._refusal or draining_error())
        self.is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in (self.loads, self.changes, self.prompts):
            pool.shutdown(wait=False, cancel_futures=True)

    def lock(self, adapter_id: AdapterId) -> asyncio.Lock:
        """Return the lock of an id, the same one as long as any caller has it."""
        return self._locks.setdefault(adapter_id, asyncio.Lock())

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a change of the store in a thread.

        A cancelled caller returns only when the function has, because the thread must not use files and directories
        that the caller then releases.
        """
        return await _ended(_submitted(self.changes, function, *arguments))

    async def tokenize(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function` in a thread for prompts; a cancelled caller does not wait for it."""
        future = _submitted(self.prompts, function, *arguments)
        try:
            return await future
        except asyncio.CancelledError:
            if self.is_closed:
                raise draining_error() from None
            raise

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; if the caller is cancelled meanwhile, return only when `work` has ended by itself."""
        return await _ended(self.keep(work))

    def keep(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Start a task and hold it until it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: a waiting caller has it too, and without one it does not matter


def _pool(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix=name, initializer=threads.compute_alone)


def _submitted(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    try:
        return asyncio.wrap_future(pool.submit(function, *arguments))
    except RuntimeError:  # raised by an executor that was shut down
        raise draining_error() from None


async def _ended(work: asyncio.Future[T]) -> T:
    """Return the result of `work`, also to a cancelled caller only when there is one. Raises DRAINING if it ended."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if work.cancelled():
            raise draining_error() from None
        await asyncio.wait([work])
        raise
