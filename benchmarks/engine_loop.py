"""Weft's engine without a server: requests go in and tokens come out on the caller's thread."""

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from benchmarks.slabs_at_hand import SlabsAtHand
from weft.adapters.identifiers import Generation
from weft.adapters.ingest import Ingested
from weft.adapters.slab import Slab
from weft.api.serve import build_model
from weft.config import WeftConfig
from weft.engine.block_manager import cache_root
from weft.engine.engine import Engine
from weft.engine.inbox import Inbox
from weft.engine.outbox import EngineEvent
from weft.engine.request import AdapterUse, MixtureUse, Request, RequestId, SamplingParams, TokenEvent
from weft.metrics import Metrics
from weft.model import threads
from weft.v1.adapter_files import pair_of

_NAP_S = 0.001


class Held(NamedTuple):
    """An adapter that the engine can have."""

    generation: Generation
    read: Ingested

    def use(self, gate: float = 1.0) -> AdapterUse:
        """How a request names it."""
        return AdapterUse(self.generation, gate, self.read.info.num_virtual_tokens)


class EngineLoop:
    """One engine; the thread that makes it is the engine's."""

    def __init__(self, config: WeftConfig) -> None:
        self.model, runner = build_model(config)
        threads.compute_with(self.model.num_threads)
        self._slabs: dict[Generation, Slab] = {}
        self._engine = Engine(
            runner,
            config.engine,
            num_kv_blocks=self.model.plan.num_kv_blocks,
            max_model_len=self.model.facts.max_model_len,
            inbox=Inbox(),
            loader=SlabsAtHand(self._slabs.__getitem__),
            publish=self._came,
            metrics=Metrics(),
        )
        self._events: list[tuple[float, list[TokenEvent]]] = []
        self._ids = count()

    def hold(self, path: Path) -> Held:
        """Read an adapter's directory; the engine loads it with its first request. Its path is its generation."""
        files = pair_of(file.name for file in path.iterdir())
        assert files is not None, path
        config, weights = (path / name for name in files)
        with config.open("rb") as config_file, weights.open("rb") as weights_file:
            size_bytes = config.stat().st_size + weights.stat().st_size
            read = self.model.ingest.read(config_file, weights_file, size_bytes=size_bytes, files=files)
        generation = generation_of(path)
        self._slabs[generation] = read.slab
        return Held(generation, read)

    def request(
        self,
        prompt: Sequence[int],
        num_new_tokens: int,
        uses: tuple[AdapterUse, ...] = (),
        mixture: MixtureUse | None = None,
        *,
        salt: str,
    ) -> Request:
        """A greedy request of exactly `num_new_tokens`."""
        return Request(
            request_id=RequestId(str(next(self._ids))),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(temperature=0, max_new_tokens=num_new_tokens),
            adapters=uses,
            mixture=mixture,
            cache_root=cache_root(salt, self.model.facts.digest, uses, mixture, prompt),
            arrival_s=time.monotonic(),
        )

    def run(self, requests: Sequence[tuple[float, Request]]) -> list[list[float]]:
        """When each token of each request came; each is submitted when it is due on the monotonic clock, in order.

        Raises what a request ended with.
        """
        waiting = deque(requests)
        token_s: dict[RequestId, list[float]] = {request.request_id: [] for _, request in requests}
        left = len(requests)
        while left:
            while waiting and waiting[0][0] <= time.monotonic():
                self._engine.submit(waiting.popleft()[1])
            self._engine.turn()
            if not self._events and waiting:
                time.sleep(_NAP_S)
            for came_s, events in self._events:
                for event in events:
                    token_s[event.request_id] += [came_s] * len(event.tokens)
                    if event.finish is not None:
                        left -= 1
                        if event.finish.error is not None:
                            raise event.finish.error
            self._events.clear()
        return list(token_s.values())

    def _came(self, events: Sequence[EngineEvent]) -> None:
        self._events.append((time.monotonic(), [event for event in events if isinstance(event, TokenEvent)]))


def generation_of(path: Path) -> Generation:
    """What the engine loop calls the adapter in a directory."""
    return Generation(hashlib.sha256(str(path).encode()).hexdigest())
