"""Every metric, once: name, unit, labels, buckets. Base units, bounded labels (a method, never an adapter id)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The metrics of one server, in its own registry, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.rpcs = Counter("weft_rpcs", "RPCs that ended, by method and status code.", ["rpc", "code"], registry=r)
        self.rpc_seconds = Histogram(
            "weft_rpc_duration_seconds", "Duration of RPCs.", ["rpc"], buckets=_SECONDS, registry=r
        )
        self.requests = Counter(
            "weft_requests", "Generate requests that ended, by finish reason.", ["finish_reason"], registry=r
        )
        for reason in ("stop", "length", "cancelled", "error"):
            self.requests.labels(reason)  # starts at 0, so that a rate counts the first one too
        self.rejections = Counter(
            "weft_request_rejections", "Generate requests that were not accepted, by reason.", ["reason"], registry=r
        )
        self.time_to_first_token = Histogram(
            "weft_time_to_first_token_seconds",
            "From acceptance to the first generated token.",
            buckets=_SECONDS,
            registry=r,
        )
        self.inter_token = Histogram(
            "weft_inter_token_seconds", "Between two tokens of one request.", buckets=_SECONDS, registry=r
        )
        self.queue_time = Histogram(
            "weft_request_queue_seconds", "From acceptance to the first step.", buckets=_SECONDS, registry=r
        )
        self.request_seconds = Histogram(
            "weft_request_duration_seconds", "From acceptance to the last token.", buckets=_SECONDS, registry=r
        )
        self.step_seconds = Histogram("weft_step_duration_seconds", "One engine step.", buckets=_SECONDS, registry=r)
        self.running = Gauge("weft_requests_running", "Requests in the batch.", registry=r)
        self.waiting = Gauge("weft_requests_waiting", "Requests that wait for a place in the batch.", registry=r)
        self.kv_usage = Gauge("weft_kv_cache_usage_ratio", "Referenced KV blocks over all blocks, 0 to 1.", registry=r)
        self.kv_blocks = Gauge("weft_kv_blocks", "KV blocks by state: used, free, cached.", ["state"], registry=r)
        self.prompt_tokens = Counter("weft_prompt_tokens", "Prompt tokens of ended requests.", registry=r)
        self.cached_tokens = Counter(
            "weft_prompt_tokens_cached", "Prompt tokens that the prefix cache answered.", registry=r
        )
        self.generation_tokens = Counter("weft_generation_tokens", "Generated tokens.", registry=r)
        self.preemptions = Counter("weft_preemptions", "Requests whose KV was taken back and recomputed.", registry=r)
        self.batch_tokens = Histogram("weft_batch_tokens", "Rows of a step.", buckets=_COUNTS, registry=r)
        self.batch_requests = Histogram("weft_batch_requests", "Requests of a step.", buckets=_COUNTS, registry=r)
        self.batch_adapters = Histogram(
            "weft_batch_distinct_adapters", "Distinct adapters of a step.", buckets=(0, *_COUNTS), registry=r
        )
        self.nonfinite_rows = Counter("weft_nonfinite_rows", "Rows whose logits were not finite.", registry=r)
        self.adapters = Gauge("weft_adapters_registered", "Registered adapters.", ["method"], registry=r)
        self.adapter_loads = Counter(
            "weft_adapter_loads", "Loads of adapters to the device.", ["method", "outcome"], registry=r
        )
        self.adapter_load_seconds = Histogram(
            "weft_adapter_load_duration_seconds",
            "From asking for an adapter to having its packed adapter.",
            buckets=_SECONDS,
            registry=r,
        )
        self.adapter_evictions = Counter(
            "weft_adapter_evictions", "Adapters that left the device for room.", ["method"], registry=r
        )
        self.adapter_resident_bytes = Gauge(
            "weft_adapter_resident_bytes", "Device bytes of resident adapters.", ["method"], registry=r
        )
        self.adapters_resident = Gauge("weft_adapters_resident", "Adapters on the device.", ["method"], registry=r)
        self.access_refusals = Counter(
            "weft_access_refusals", "RPCs refused before their request was read, by reason.", ["reason"], registry=r
        )
        for reason in ("TOKEN_MISSING", "TOKEN_MALFORMED", "TOKEN_INVALID", "ROLE_REQUIRED"):
            self.access_refusals.labels(reason)
        self.audit_lines = Counter(
            "weft_audit_lines", "Lines for the audit log, by outcome: written or lost.", ["outcome"], registry=r
        )
        for outcome in ("written", "lost"):
            self.audit_lines.labels(outcome)
        self.event_loop_lag = Histogram(
            "weft_event_loop_lag_seconds", "How late the event loop woke up.", buckets=_SECONDS, registry=r
        )
        self.build_info = Gauge(
            "weft_build_info",
            "Always 1.",
            ["version", "model", "quantization", "device", "dtype", "kernels"],
            registry=r,
        )
