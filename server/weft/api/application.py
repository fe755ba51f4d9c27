"""The application: everything a transport calls, without a transport.

gRPC calls it today; an HTTP front or another host process would call the same object.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weft import __version__
from weft.adapters.host import HostCache
from weft.adapters.identifiers import AdapterId, Generation
from weft.adapters.ingest import Ingest
from weft.adapters.store import AdapterStore
from weft.api.generation import Generation as GenerationFlow
from weft.api.generation import ModelFacts
from weft.api.lifecycle import Lifecycle, RegisterOptions
from weft.api.memory_plan import MemoryPlan
from weft.config import WeftConfig
from weft.engine.engine import ENGINE_DOWN, Engine, EngineCallbacks, draining
from weft.engine.request import TokenEvent
from weft.engine.runner import Runner
from weft.errors import Unavailable, WeftError
from weft.methods.protocol import BaseShape
from weft.metrics import Metrics
from weft.model import threads
from weft.model.loader import WeightBytes

_LAG_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The base as the application tells of it."""

    facts: ModelFacts
    shape: BaseShape
    ingest: Ingest
    quantization: str
    dtype: str
    device: str
    kernels: str
    plan: MemoryPlan
    num_threads: int  # that compute a step
    weights: WeightBytes
    rope_factors: str  # which a model with factors by length was fixed to (model/rope.py); "" for the others


class Application:
    """One engine, its adapters and its requests. Create it on the event loop that will serve it."""

    def __init__(self, config: WeftConfig, model: ServedModel, runner: Runner, metrics: Metrics) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        self.model = model
        self.metrics = metrics
        self.down = asyncio.Event()

        def deliver(events: list[TokenEvent]) -> None:
            loop.call_soon_threadsafe(self.generation.deliver, events)

        def load(generation: Generation) -> None:
            self.lifecycle.memory.fetch(generation)

        def resident(generations: frozenset[Generation]) -> None:
            loop.call_soon_threadsafe(self.lifecycle.memory.residents_are, generations)

        def unfit(generation: Generation, error: WeftError) -> None:
            loop.call_soon_threadsafe(self.lifecycle.registry.fail, generation, error.reason)

        def down() -> None:
            loop.call_soon_threadsafe(self._engine_is_down)

        self._engine = Engine(
            runner,
            config.engine,
            num_kv_blocks=model.plan.num_kv_blocks,
            max_model_len=model.facts.max_model_len,
            callbacks=EngineCallbacks(events=deliver, load=load, resident=resident, unfit=unfit, down=down),
            metrics=metrics,
        )
        self.lifecycle = Lifecycle(
            engine=self._engine,
            store=AdapterStore(config.store, config.adapters, allowed_sources=config.allowed_sources),
            ingest=model.ingest._replace(base=model.ingest.base.read_through(self._on_engine_thread)),
            host=HostCache(config.residency.host_bytes),
            device_bytes=config.residency.device_bytes,
            metrics=metrics,
            cancel=lambda request_id, error: self.generation.cancel(request_id, error),
        )
        self.generation = GenerationFlow(
            engine=self._engine,
            registry=self.lifecycle.registry,
            model=model.facts,
            limits=config.requests,
            max_requests=config.engine.max_num_seqs + config.engine.max_queued_requests,
            metrics=metrics,
        )
        metrics.build_info.labels(
            __version__, model.facts.name, model.quantization, model.device, model.dtype, model.kernels
        ).set(1)
        self._lag = loop.create_task(self._measure_lag())

    async def start(
        self,
        adapters: list[tuple[AdapterId, Path]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Start the engine, restore the store's adapters and register those named at the start."""
        self._engine.start()
        await asyncio.wrap_future(self._engine.call(partial(threads.compute_with, self.model.num_threads)))
        await self.lifecycle.restore(progress)
        for adapter_id, path in adapters:
            await self.lifecycle.register_from(adapter_id, str(path), RegisterOptions(replace=True))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait for the requests inside; False where some are left at the limit."""
        self.generation.refuse(draining())
        self.lifecycle.refuse(draining())
        try:
            await asyncio.wait_for(self.generation.wait_empty(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End everything that is left; every request gets its terminal event."""
        await asyncio.to_thread(self._engine.stop, 30.0)
        await asyncio.sleep(0)  # the last events are on the loop's queue
        self._lag.cancel()
        await self.lifecycle.close()

    def _on_engine_thread(self, function: Callable[[], Any]) -> Any:
        """Read the base where its memory may be touched; called by workers that lay an adapter out."""
        return self._engine.call(function).result()

    def _engine_is_down(self) -> None:
        down = Unavailable(ENGINE_DOWN, "the engine stopped by a fault", retry_after_s=5.0)
        self.generation.refuse(down)
        self.lifecycle.refuse(down)
        self.down.set()

    async def _measure_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_PERIOD_S)
            self.metrics.event_loop_lag.observe(max(0.0, time.monotonic() - before - _LAG_PERIOD_S))
