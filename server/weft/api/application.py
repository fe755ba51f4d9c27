"""The application: everything a transport calls, without a transport.

gRPC calls it today; an HTTP front or another host process would call the same object.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weft import __version__
from weft.adapters.identifiers import AdapterDigest, AdapterId
from weft.adapters.ingest import Ingest
from weft.adapters.loader import AdapterLoader, HostCache
from weft.adapters.store import AdapterStore
from weft.api.admission import Admission
from weft.api.lifecycle import Lifecycle, Registration
from weft.api.memory_plan import MemoryPlan
from weft.api.quota import Quotas
from weft.api.request_flow import RequestFlow
from weft.api.watchdog import Watchdog
from weft.api.work import Work
from weft.config import WeftConfig
from weft.engine.engine import Engine
from weft.engine.inbox import Inbox
from weft.engine.outbox import AdapterFailed, AdaptersResident, EngineDown, EngineEvent
from weft.engine.request import TokenEvent
from weft.engine.runner import Runner
from weft.errors import Unavailable, draining_error
from weft.metrics import Metrics
from weft.model import threads
from weft.model.loader import Base, WeightBytes

_LAG_PERIOD_S = 0.5
_STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A base and how it is served. Its max_model_len is the longest request that fits the memory.

    kernels: name of the kernels. num_threads: threads that compute a step.
    rope_factors: the factors chosen for a model whose rotary factors depend on length (model/rope.py), else "".
    """

    base: Base
    ingest: Ingest
    kernels: str
    plan: MemoryPlan
    num_threads: int
    weights: WeightBytes
    rope_factors: str

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model computes in, such as "bfloat16"."""
        return str(self.base.dtype).removeprefix("torch.")


class Application:
    """One engine, its adapters and its requests. Create it on the event loop that will serve it."""

    def __init__(self, config: WeftConfig, model: ServedModel, runner: Runner, metrics: Metrics) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        self.model = model
        self.metrics = metrics
        self.down = asyncio.Event()
        self.work = Work()
        self._inbox = Inbox()
        store = AdapterStore(config.store, config.adapters, allowed_sources=config.allowed_sources)
        # Packing some adapters reads the base's weights, which only the engine thread may touch.
        ingest = model.ingest._replace(base=model.ingest.base.read_through(self._inbox.run))
        host = HostCache(config.residency.host_bytes)
        loader = AdapterLoader(
            store=store,
            ingest=ingest,
            host=host,
            workers=self.work.loads,
            metrics=metrics,
            size_of=self._packed_bytes,
        )
        self.engine = Engine(
            runner,
            config.engine,
            num_kv_blocks=model.plan.num_kv_blocks,
            max_model_len=model.base.max_model_len,
            inbox=self._inbox,
            loader=loader,
            publish=partial(loop.call_soon_threadsafe, self._receive),
            metrics=metrics,
        )
        device_bytes, pinned_bytes_max = config.residency.device_bytes, config.residency.pinned_bytes_max
        self.lifecycle = Lifecycle(
            engine=self.engine,
            store=store,
            loader=loader,
            work=self.work,
            device_bytes=device_bytes,
            pinned_bytes_max=device_bytes // 2 if pinned_bytes_max is None else pinned_bytes_max,
            tenants=config.tenants,
            metrics=metrics,
        )
        self.quotas = Quotas(config.server)
        self.requests = RequestFlow(
            engine=self.engine,
            lifecycle=self.lifecycle,
            admission=Admission(self.lifecycle, model.base, config.requests, config.engine),
            work=self.work,
            base=model.base,
            limits=config.requests,
            quotas=self.quotas,
            metrics=metrics,
        )
        self._has_given_up = False
        self._tasks = [loop.create_task(self._measure_lag())]

    async def start(self, adapters: list[tuple[AdapterId, Path]], progress: Callable[[int, int], None]) -> None:
        """Start the engine, register the adapters of the store, and then `adapters`."""
        model, base = self.model, self.model.base
        held_as = base.quantization.value, base.device.type, model.dtype
        labels = __version__, base.shape.name, *held_as, model.kernels
        self.metrics.build_info.labels(*labels).set(1)
        self.engine.start()
        self._tasks.append(asyncio.create_task(self._watch_engine()))
        await asyncio.wrap_future(self._inbox.call(partial(threads.compute_with, model.num_threads)))
        await self.lifecycle.following.restore(progress)
        for adapter_id, path in adapters:
            await self.lifecycle.register_from(Registration(adapter_id=adapter_id, source=str(path), replace=True))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait for the accepted requests; False if some have not ended after `timeout_s`."""
        self.work.refuse(draining_error())
        try:
            await asyncio.wait_for(self.requests.admission.empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop everything. Every request that has not ended gets its terminal event."""
        self.lifecycle.following.stop()
        for task in self._tasks:
            task.cancel()
        if not await asyncio.to_thread(self.engine.stop, _STOP_S):
            self._give_up(draining_error())
        await asyncio.sleep(0)  # the last events are in the loop's queue
        self.lifecycle.watches.end()
        await self.work.close()

    def _packed_bytes(self, digest: AdapterDigest) -> int:
        """Return the size of an adapter in memory, as its description says; any thread may ask."""
        return max((version.info.packed_bytes for version in self.lifecycle.registry.of(digest)), default=0)

    def _receive(self, events: Sequence[EngineEvent]) -> None:
        """Dispatch the engine's events; called on the event loop."""
        if self._has_given_up:
            return  # they come from a thread that woke up late, and its requests have ended
        for event in events:
            match event:
                case TokenEvent():
                    self.requests.deliver(event)
                case AdaptersResident(digests):
                    self.lifecycle.memory.residents_are(digests)
                case AdapterFailed(digest, error):
                    self.lifecycle.memory.failed(digest, error)
                case EngineDown(error):
                    self.work.refuse(error)
                    self.down.set()

    async def _watch_engine(self) -> None:
        error = await Watchdog(self.engine, self.config.engine.step_timeout_s).watch()
        if not self.down.is_set():
            self._give_up(error)

    def _give_up(self, error: Unavailable) -> None:
        """End everything that waits for the engine, without the engine."""
        self._has_given_up = True
        self.work.refuse(error)
        self.engine.abandon(error)
        self.requests.fail_all(error)
        self.down.set()

    async def _measure_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_PERIOD_S)
            self.metrics.event_loop_lag.observe(max(0.0, time.monotonic() - before - _LAG_PERIOD_S))
