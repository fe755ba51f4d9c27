"""Messages to the engine thread, applied there between two steps. Any thread may send them."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple, TypeVar

from weft.errors import Unavailable, WeftError

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Message(NamedTuple):
    """A call to make on the engine thread, and the one to make with the error if the engine has stopped."""

    apply: Callable[[], object]
    refuse: Callable[[WeftError], object]


class Inbox:
    """The only way onto the engine thread.

    refusal: the error that answers every message from now on; None while messages are applied.
    """

    def __init__(self) -> None:
        self.refusal: Unavailable | None = None
        self._messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._is_closed = False
        self._after_close = threading.Lock()
        self._open: set[Future[Any]] = set()

    def post(self, apply: Callable[[], object], refuse: Callable[[WeftError], object] = lambda error: None) -> None:
        """Send a message. If the inbox is closed, the sender's thread refuses it, so that no message waits forever."""
        self._messages.put(_Message(apply, refuse))
        if self._is_closed:
            self._refuse_all()

    def awaited(self, future: "Future[T]") -> "Future[T]":
        """Return a future that the engine thread is to end, and that `abandon` ends if it does not."""
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the engine thread between two steps."""
        future: Future[T] = self.awaited(Future())

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the caller cancelled
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        def refuse(error: WeftError) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self.post(run, refuse)
        return future

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine thread and wait for its result."""
        return self.call(function).result()

    def take(self, timeout_s: float | None) -> bool:
        """Handle a message if one arrives within `timeout_s`; None waits forever. Called on the engine thread."""
        try:
            message = self._messages.get(timeout_s != 0.0, timeout=timeout_s)
        except queue.Empty:
            return False
        if self.refusal is None:
            message.apply()
            return True
        try:
            message.refuse(self.refusal)
        except Exception:
            _log.exception("engine: an answer was lost")  # later messages are still answered
        return True

    def close(self, refusal: Unavailable) -> None:
        """Refuse messages on the sender's thread from now on: with `refusal`, unless one is set already."""
        self.refusal = self.refusal or refusal
        self._is_closed = True
        self._refuse_all()

    def abandon(self, refusal: Unavailable) -> None:
        """Refuse all messages, also those that the engine thread has taken and does not answer."""
        self.close(refusal)
        for future in list(self._open):
            with contextlib.suppress(InvalidStateError):  # the thread has just answered
                future.set_exception(refusal)

    def _refuse_all(self) -> None:
        with self._after_close:
            while self.take(0.0):
                pass
