"""A model and adapters as a server holds them, and a trace of requests through its engine, without gRPC."""

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from benchmarks.driven_engine import DrivenEngine
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.ingest import Ingested
from weft.adapters.packed_adapter import PackedAdapter
from weft.api.serve import build_model
from weft.config import WeftConfig
from weft.engine.block_manager import cache_root
from weft.engine.request import AdapterUse, MixtureUse, Request, RequestId, SamplingParams
from weft.model import threads
from weft.v1.adapter_files import pair_of

_NAP_S = 0.001


class Held(NamedTuple):
    """An adapter in host memory, which the engine loads when a request needs it."""

    digest: AdapterDigest
    read: Ingested

    def use(self, gate: float = 1.0) -> AdapterUse:
        """Return the use of this adapter in a request."""
        return AdapterUse(self.digest, gate, self.read.info.num_virtual_tokens)


class EngineLoop:
    """One engine, which belongs to the thread that makes it."""

    def __init__(self, config: WeftConfig) -> None:
        self.model, runner = build_model(config)
        threads.compute_with(self.model.num_threads)
        self._packed_adapters: dict[AdapterDigest, PackedAdapter] = {}
        self._engine = DrivenEngine(
            runner,
            config.engine,
            num_kv_blocks=self.model.plan.num_kv_blocks,
            max_model_len=self.model.base.max_model_len,
            packed_of=self._packed_adapters.__getitem__,
        )
        self._ids = count()

    def hold(self, path: Path) -> Held:
        """Read an adapter's directory; the engine loads it with its first request. Its path serves as its digest."""
        files = pair_of(file.name for file in path.iterdir())
        assert files is not None, path
        config, weights = (path / name for name in files)
        with config.open("rb") as config_file, weights.open("rb") as weights_file:
            size_bytes = config.stat().st_size + weights.stat().st_size
            read = self.model.ingest.read(config_file, weights_file, size_bytes=size_bytes, files=files)
        digest = digest_of(path)
        self._packed_adapters[digest] = read.packed
        return Held(digest, read)

    def request(
        self,
        prompt: Sequence[int],
        num_new_tokens: int,
        uses: tuple[AdapterUse, ...] = (),
        mixture: MixtureUse | None = None,
        *,
        salt: str,
    ) -> Request:
        """Make a greedy request of exactly `num_new_tokens`."""
        return Request(
            request_id=RequestId(str(next(self._ids))),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(temperature=0, max_new_tokens=num_new_tokens),
            adapters=uses,
            mixture=mixture,
            cache_root=cache_root(salt, self.model.base.shape.digest, uses, mixture, prompt),
            arrival_s=time.monotonic(),
        )

    def run(self, requests: Sequence[tuple[float, Request]]) -> list[list[float]]:
        """Submit each request at its time on the monotonic clock, in order; return the arrival times of its tokens.

        Raises the error that a request ended with.
        """
        waiting = deque(requests)
        token_s: dict[RequestId, list[float]] = {request.request_id: [] for _, request in requests}
        left = len(requests)
        while left:
            while waiting and waiting[0][0] <= time.monotonic():
                self._engine.submit(waiting.popleft()[1])
            events = self._engine.drive()
            if not events and waiting:
                time.sleep(_NAP_S)
            for came_s, event in events:
                token_s[event.request_id] += [came_s] * len(event.tokens)
                left -= event.finish is not None
        return list(token_s.values())


def digest_of(path: Path) -> AdapterDigest:
    """Return the name of a directory's adapter in the engine."""
    return AdapterDigest(hashlib.sha256(str(path).encode()).hexdigest())
