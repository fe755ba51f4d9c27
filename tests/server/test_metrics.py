"""A scrape, compared with the test's own calls: every metric, exact counters, bounded labels, conservation."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.metrics_core import Metric

from tests.server.conftest import Sources
from tests.server.live import PROMPT, LiveServer, Step, refused, wait_until
from weft.methods.catalog import KINDS
from weft.metrics import Metrics

Scrape = dict[str, Metric]


def value(scrape: Scrape, sample: str, **labels: str) -> float:
    """Return one sample; 0 if it does not exist yet."""
    for metric in scrape.values():
        for found in metric.samples:
            if found.name == sample and found.labels == labels:
                return found.value
    return 0.0


class Change:
    """The difference of samples between two scrapes."""

    before: Scrape
    after: Scrape
    steps: list[Step]

    def __call__(self, sample: str, **labels: str) -> float:
        return value(self.after, sample, **labels) - value(self.before, sample, **labels)

    def by(self, sample: str, label: str) -> dict[str, float]:
        """Return the changes by a label's value, without zeros."""
        values = {s.labels[label] for m in self.after.values() for s in m.samples if s.name == sample}
        changes = {one: self(sample, **{label: one}) for one in values}
        return {one: change for one, change in changes.items() if change}


@contextmanager
def change_of(live: LiveServer) -> Iterator[Change]:
    """Yield the change between the begin and the end of the block; the server is idle at both."""
    change = Change()
    wait_until(lambda: live.application.requests.admission.num_requests == 0)
    change.before, start = live.scrape(), len(live.gate.steps)
    yield change
    wait_until(lambda: live.application.requests.admission.num_requests == 0)
    wait_until(lambda: value(live.scrape(), "weft_requests_running") == 0)
    change.after, change.steps = live.scrape(), live.gate.steps[start:]


def test_every_metric_is_there(server: LiveServer) -> None:
    wanted = {(metric.name, metric.type) for metric in Metrics().registry.collect()}
    assert len(wanted) > 25
    assert wanted == {(metric.name, metric.type) for metric in server.scrape().values()}
    for metric in server.scrape().values():
        assert metric.documentation
    info = server.scrape()["weft_build_info"].samples
    assert [(sample.value, sample.labels["model"], sample.labels["quantization"]) for sample in info] == [
        (1.0, "tiny-llama", "nf4")
    ]


def test_counters_equal_what_was_done(server: LiveServer) -> None:
    client, prompt_tokens = server.client, len(PROMPT)
    first = client.tokens(None, 6)
    stop = {"max_new_tokens": 6, "stop_token_ids": [first[2]]}
    stops_after = first.index(first[2]) + 1
    with change_of(server) as change:
        for name in (None, "lora-1", "ia3-1"):
            assert len(client.tokens(name, 6, cache_salt="metrics")) == 6
        assert len(client.tokens(None, cache_salt="metrics-2", stopping=stop)) == stops_after
        again = client.generate(None, 6, cache_salt="metrics")
        cached = again.finish.usage.cached_prompt_tokens
        assert cached == prompt_tokens // 16 * 16
        with server.gate.held():
            leaving = client.stream("lora-1", 20, cache_salt="metrics-3")
            server.gate.let(4)
            leaving.wait_tokens(4)
            leaving.cancel()
            wait_until(lambda: not leaving.is_running)
            # The engine is in its fifth step by now, and gets the message after it.
            server.loop.run(_turn())
        for bad in ("nobody", "nobody", "UPPER"):
            with pytest.raises(Exception, match="adapter_id"):
                client.generate(bad)
        client.get("lora-1")
    ended = change.by("weft_requests_total", "finish_reason")
    assert ended == {"length": 4, "stop": 1, "cancelled": 1}
    tokens = 4 * 6 + stops_after + 5
    assert change("weft_generation_tokens_total") == tokens
    assert change("weft_prompt_tokens_total") == 6 * prompt_tokens
    assert change("weft_prompt_tokens_cached_total") == cached
    assert change("weft_time_to_first_token_seconds_count") == 6
    assert change("weft_inter_token_seconds_count") == tokens - 6
    assert change("weft_request_queue_seconds_count") == 6
    assert change("weft_request_duration_seconds_count") == 6
    assert change.by("weft_request_rejections_total", "reason") == {"ADAPTER_NOT_FOUND": 2, "ID_INVALID": 1}
    rpcs = {
        (s.labels["rpc"], s.labels["code"]): change(s.name, **s.labels)
        for s in change.after["weft_rpcs"].samples
        if s.name == "weft_rpcs_total" and change(s.name, **s.labels)
    }
    assert rpcs == {
        ("Generate", "OK"): 5,
        ("Generate", "NOT_FOUND"): 2,
        ("Generate", "INVALID_ARGUMENT"): 1,
        ("StreamGenerate", "CANCELLED"): 1,
        ("GetAdapter", "OK"): 1,
    }
    assert change("weft_rpc_duration_seconds_count", rpc="Generate") == 8
    _assert_steps(change)


def test_batches_are_counted_as_they_were(server: LiveServer) -> None:
    """Three adapters and the base, in one batch."""
    with change_of(server) as change, server.gate.held():
        streams = [server.client.stream(name, 6) for name in (None, "lora-1", "ia3-1", "lora-1")]
        wait_until(lambda: server.application.requests.admission.num_requests == 4)
        server.gate.open()
        for stream in streams:
            stream.result()
    assert max(step.num_requests for step in change.steps) >= 3
    assert max(step.num_adapters for step in change.steps) == 2
    _assert_steps(change)
    at_most_1 = change("weft_batch_distinct_adapters_bucket", le="1.0")
    at_most_2 = change("weft_batch_distinct_adapters_bucket", le="2.0")
    assert at_most_2 - at_most_1 == sum(step.num_adapters == 2 for step in change.steps)


def _assert_steps(change: Change) -> None:
    assert change("weft_step_duration_seconds_count") == len(change.steps)
    assert change("weft_batch_tokens_sum") == sum(step.num_rows for step in change.steps)
    assert change("weft_batch_requests_sum") == sum(step.num_requests for step in change.steps)
    assert change("weft_batch_distinct_adapters_count") == len(change.steps)
    assert change("weft_batch_distinct_adapters_sum") == sum(step.num_adapters for step in change.steps)


def test_gauges_follow(tight: LiveServer) -> None:
    with tight.gate.held():
        streams = [tight.client.stream(None, 20) for _ in range(4)]
        wait_until(lambda: tight.application.requests.admission.num_requests == 4)
        tight.gate.let(10)
        scrape = tight.scrape()
        assert value(scrape, "weft_requests_running") == 2
        assert value(scrape, "weft_requests_waiting") == 2
        used = value(scrape, "weft_kv_blocks", state="used")
        assert 0 < value(scrape, "weft_kv_cache_usage_ratio") == used / 40
        assert used + value(scrape, "weft_kv_blocks", state="free") == 40
    for stream in streams:
        stream.result()
    wait_until(lambda: value(tight.scrape(), "weft_requests_running") == 0)
    scrape = tight.scrape()
    assert value(scrape, "weft_requests_waiting") == 0
    assert value(scrape, "weft_kv_blocks", state="used") == 0
    assert value(scrape, "weft_kv_blocks", state="cached") > 0
    wait_until(lambda: value(tight.scrape(), "weft_event_loop_lag_seconds_count") > 0)


def test_loads_evictions_and_residents_by_method(tight: LiveServer, sources: Sources) -> None:
    client = tight.client
    client.unload("lora-1")
    with change_of(tight) as change:
        for name in ("lora-2", "ia3-2", "prefix-2", "lora-3", "lora-4"):
            client.register(name, sources(name))
            client.generate(name, 1)
        client.generate("lora-2", 1)
        client.load("ia3-2", pin=True)
        client.load("prefix-2")
    residents = {adapter.adapter_id: adapter for adapter in client.list().adapters if adapter.residency == 1}
    loads = {
        s.labels["method"]: change(s.name, **s.labels)
        for s in change.after["weft_adapter_loads"].samples
        if s.name == "weft_adapter_loads_total" and s.labels["outcome"] == "ok"
    }
    evictions = {method: change("weft_adapter_evictions_total", method=method) for method in ("lora", "ia3", "prefix")}
    assert sum(loads.values()) - sum(evictions.values()) == len(residents)
    assert evictions["lora"] >= 1, "three LoRAs do not fit together"
    assert change("weft_adapter_load_duration_seconds_count") == sum(loads.values())
    for method in ("lora", "ia3", "prefix"):
        there = [adapter for adapter in residents.values() if adapter.method == method]
        assert value(change.after, "weft_adapters_resident", method=method) == len(there), method
        size_bytes = sum(adapter.resident_bytes for adapter in there)
        assert value(change.after, "weft_adapter_resident_bytes", method=method) == size_bytes, method
    assert value(change.after, "weft_adapters_registered", method="lora") == 4
    assert value(change.after, "weft_adapters_registered", method="prefix") == 1
    for name in ("lora-2", "ia3-2", "prefix-2", "lora-3", "lora-4"):
        client.unregister(name)
    scrape = tight.scrape()
    assert value(scrape, "weft_adapters_registered", method="lora") == 1
    assert value(scrape, "weft_adapters_registered", method="prefix") == 0
    for method in ("ia3", "prefix"):
        assert value(scrape, "weft_adapters_resident", method=method) == 0
        assert value(scrape, "weft_adapter_resident_bytes", method=method) == 0


def test_rows_that_are_not_finite_are_counted(tight: LiveServer, poison: str) -> None:
    with change_of(tight) as change:
        refused(lambda: tight.client.generate(poison), "FAILED_PRECONDITION", "ADAPTER_NON_FINITE")
    assert change("weft_nonfinite_rows_total") == 1
    assert change.by("weft_requests_total", "finish_reason") == {"error": 1}


def test_what_was_accepted_has_ended_once(tight: LiveServer) -> None:
    """Conservation, among many requests that finish, are cancelled, are refused, or run out of time."""
    with change_of(tight) as change:
        accepted = refusals = 0
        for turn in range(3):
            with tight.gate.held():
                streams = [tight.client.stream("lora-1" if i % 2 else None, 4) for i in range(10)]
                wait_until(lambda streams=streams: sum(not stream.is_running for stream in streams) == 6)
                tight.gate.let(2 + turn)
                running = [stream for stream in streams if stream.is_running]
                accepted, refusals = accepted + len(running), refusals + 10 - len(running)
                running[turn].cancel()
            for stream in streams:
                wait_until(lambda stream=stream: not stream.is_running)
        with tight.gate.held():
            with pytest.raises(Exception, match="Deadline"):
                tight.client.generate(num_tokens=4, timeout=0.1)
            accepted += 1
    ended = change.by("weft_requests_total", "finish_reason")
    assert sum(ended.values()) == accepted == 13, ended
    assert change.by("weft_request_rejections_total", "reason") == {"QUEUE_FULL": refusals}
    assert refusals == 18


def test_no_adapter_is_named_in_a_label(server: LiveServer, sources: Sources) -> None:
    names = ["lora-1", "ia3-1", "prefix-1", "named-in-no-label"]
    server.client.register("named-in-no-label", sources("lora-2"))
    digest = server.client.get("named-in-no-label").digest
    server.client.generate("named-in-no-label", 1)
    with pytest.raises(Exception, match="not registered"):
        server.client.generate("not-there-at-all")
    server.client.unregister("named-in-no-label")
    labels: dict[str, set[str]] = {}
    for metric in server.scrape().values():
        for sample in metric.samples:
            for label, of in sample.labels.items():
                labels.setdefault(label, set()).add(of)
    values = set().union(*labels.values())
    assert not values & {*names, digest, "not-there-at-all"}
    assert set(labels) == {
        "rpc", "code", "finish_reason", "reason", "state", "method", "outcome", "le",
        "version", "model", "quantization", "device", "dtype", "kernels",
    }  # fmt: skip
    assert labels["method"] <= {*KINDS, ""}


async def _turn() -> None:
    """Run one iteration of the event loop."""
