"""The engine's metrics. Called only on the engine thread."""

from collections.abc import Sequence

from weft.adapters.packed_adapter import PackedAdapter
from weft.engine.request import Finish, Request
from weft.engine.scheduler import Scheduled, Scheduler
from weft.metrics import Metrics


class Observer:
    """Counts steps, tokens, requests and adapters of one engine."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def step(self, step: Sequence[Scheduled], scheduler: Scheduler, *, seconds: float, now: float) -> None:
        """Count a step that took `seconds` and ended `now`."""
        metrics = self._metrics
        adapters = set()
        for request, _ in step:
            adapters.update(request.digests)
            if request.scheduled_s is None and not request.is_probe:
                request.scheduled_s = now - seconds
                metrics.queue_time.observe(request.scheduled_s - request.arrival_s)
        metrics.step_seconds.observe(seconds)
        metrics.batch_tokens.observe(sum(num_tokens for _, num_tokens in step))
        metrics.batch_requests.observe(len(step))
        metrics.batch_adapters.observe(len(adapters))
        self.queue(scheduler)

    def queue(self, scheduler: Scheduler) -> None:
        """Set the gauges, also if nothing was computed."""
        metrics, blocks = self._metrics, scheduler.blocks
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.kv_usage.set(blocks.num_used_blocks / blocks.num_blocks)
        metrics.kv_blocks.labels("used").set(blocks.num_used_blocks)
        metrics.kv_blocks.labels("free").set(blocks.num_free_blocks)
        metrics.kv_blocks.labels("cached").set(blocks.num_cached_blocks)
        if scheduler.num_preemptions:
            metrics.preemptions.inc(scheduler.num_preemptions)
            scheduler.num_preemptions = 0

    def token(self, request: Request, now: float) -> None:
        """Count a token of a request, whose `last_token_s` is still that of the one before."""
        if request.is_probe:
            return
        if request.last_token_s is None:
            self._metrics.time_to_first_token.observe(now - request.arrival_s)
        else:
            self._metrics.inter_token.observe(now - request.last_token_s)
        self._metrics.generation_tokens.inc()

    def row_not_finite(self, request: Request) -> None:
        if not request.is_probe:
            self._metrics.nonfinite_rows.inc()

    def request_ended(self, request: Request, finish: Finish, now: float) -> None:
        """Count a request that ended, for whatever reason."""
        if request.is_probe:
            return
        metrics = self._metrics
        metrics.requests.labels(finish.reason.value).inc()
        metrics.request_seconds.observe(now - request.arrival_s)
        metrics.prompt_tokens.inc(finish.num_prompt_tokens)
        metrics.cached_tokens.inc(finish.num_cached_tokens)

    def adapter_placed(self, packed: PackedAdapter) -> None:
        method = packed.method.name
        self._metrics.adapter_loads.labels(method, "ok").inc()
        self._metrics.adapters_resident.labels(method).inc()
        self._metrics.adapter_resident_bytes.labels(method).inc(packed.size_bytes)

    def adapter_left(self, packed: PackedAdapter, *, for_room: bool) -> None:
        """Count an adapter that left the device; for_room: it was evicted."""
        method = packed.method.name
        if for_room:
            self._metrics.adapter_evictions.labels(method).inc()
        self._metrics.adapters_resident.labels(method).dec()
        self._metrics.adapter_resident_bytes.labels(method).dec(packed.size_bytes)

    def load_failed(self) -> None:
        """Count an adapter that could not be loaded; its method is unknown here."""
        self._metrics.adapter_loads.labels("", "failed").inc()
