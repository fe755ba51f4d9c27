"""One team of OpenMP threads in a serving process: the engine's.

Each thread that runs a parallel operation gets a team of its own, kept for its life. With more threads in all teams
than cores, the runtime lets those of every team sleep between two operations instead of waiting awake, and a decode
step of some hundred small operations takes half as long again. So what loads the base ends with its team, the engine
thread has the one that stays, and every other thread computes alone.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def compute_with(num_threads: int) -> None:
    """How many threads the caller's operations run on, from now to its end."""
    torch.get_num_threads()  # a thread's first operation takes over the number that any thread set last: be past that
    torch.set_num_threads(num_threads)


def compute_alone() -> None:
    """For threads beside the engine's."""
    compute_with(1)


def on_a_thread_that_ends(function: Callable[[], T], *, num_threads: int) -> T:
    """The result of `function`, run on `num_threads`; its team is gone when this returns."""
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
