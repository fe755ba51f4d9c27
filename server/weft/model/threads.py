"""Keep one team of OpenMP threads in a serving process: the engine's.

Each thread that runs a parallel operation gets its own team, kept for its life. If all teams together have more threads
than there are cores, the runtime lets every team's threads sleep between two operations instead of spinning, and a
decode step of some hundred small operations takes half as long again. So the thread that loads the base ends, with its
team; the engine thread keeps the one that stays; and every other thread computes alone.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def compute_with(num_threads: int) -> None:
    """Set the number of threads on which the caller's operations run until it ends."""
    torch.get_num_threads()  # a thread's first operation inherits the last number set anywhere: let that happen first
    torch.set_num_threads(num_threads)


def compute_alone() -> None:
    """Let a thread other than the engine's compute without a team."""
    compute_with(1)


def on_a_thread_that_ends(function: Callable[[], T], *, num_threads: int) -> T:
    """Return the result of `function`, run in a new thread with `num_threads`; its team is gone when this returns."""
    future: Future[T] = Future()

    def run() -> None:
        compute_with(num_threads)
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="weft-load", daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    try:
        return future.result()
    finally:
        if future.done():
            thread.join()
