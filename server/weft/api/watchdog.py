"""The watch over the engine thread: whether it still comes round, also when there is nothing to do.

It runs on the event loop, since the engine thread cannot see that it hangs. A message without effect is always on its
way to the engine. If neither an answer to it nor any other progress is seen for `timeout_s`, the thread hangs; if the
message is refused, the thread is gone.
"""

import asyncio
import logging
import os
import sys
from typing import NoReturn

from weft.engine.endings import engine_down
from weft.engine.engine import Engine
from weft.errors import Unavailable

_log = logging.getLogger(__name__)

_PERIOD_S = 0.25  # a hang is seen at most two periods after the bound


class Watchdog:
    """Watches one engine. timeout_s: the longest step, or other work of the engine thread."""

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s

    async def watch(self) -> Unavailable:
        """Return, once the engine thread hangs or is gone, the error of every request that it has."""
        loop, engine = asyncio.get_running_loop(), self._engine
        seen, since_s, probe = engine.progress, loop.time(), engine.probe()
        while True:
            await asyncio.sleep(_PERIOD_S)
            if probe.done():
                if probe.exception() is not None:
                    return engine_down("its thread has ended")
                probe, since_s = engine.probe(), loop.time()
            elif engine.progress != seen:
                seen, since_s = engine.progress, loop.time()
            elif loop.time() - since_s > self._timeout_s:
                _log.error(
                    "engine: nothing has moved for %g s (step_timeout_s); its thread is here:\n%s",
                    self._timeout_s,
                    engine.where(),
                )
                return engine_down(f"it has not ended a step for {self._timeout_s:g} s")


def exit_at_once(code: int) -> NoReturn:
    """End the process without waiting for any thread: the engine's may never return."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
