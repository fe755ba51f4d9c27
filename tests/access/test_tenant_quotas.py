"""Quotas of each tenant: the tenant is told, the others notice nothing."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.access.callers import client_of
from tests.access.conftest import stored
from tests.server.conftest import Sources
from tests.server.files import upload_messages
from tests.server.live import Client, LiveServer, Loop, refused, wait_until
from weft.api.access import token_file
from weft.api.access.token import Token
from weft.api.tenant_quotas import TokenBucket
from weft.config import AccessConfig, TenantLimits, WeftConfig

_LIMITS = TenantLimits(
    requests_max=2,
    tokens_per_minute_max=200,
    adapters_max=2,
    adapter_bytes_max=200_000,
    pinned_bytes_max=20_000,
    uploads_max=1,
)


@pytest.fixture
def limited(
    loop: Loop,
    protected: LiveServer,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[LiveServer, Client, Client]]:
    """Yield a server with the limits of the test alone, and clients of two tenants."""
    directory = tmp_path_factory.mktemp("limited")
    given = {name: Token.new() for name in ("acme", "beta")}
    for name, token in given.items():
        token_file.add(directory / "tokens.json", stored(token, name))
    config: WeftConfig = replace(
        protected.config,
        store=directory / "store",
        access=AccessConfig(token_file=directory / "tokens.json"),
        tenants=TenantLimits(**{name: getattr(_LIMITS, name) for name in request.param}),
    )
    live = LiveServer(loop, config)
    acme, beta = (client_of(live.serving.port, token) for token in given.values())
    yield live, acme, beta
    live.stop()


@pytest.mark.parametrize("limited", [("adapters_max",)], indirect=True)
def test_adapters(limited: tuple[LiveServer, Client, Client], sources: Sources) -> None:
    _, acme, beta = limited
    for name in ("one", "two"):
        acme.register(name, sources("lora-1"))
    refused(
        lambda: acme.register("three", sources("lora-1")),
        "RESOURCE_EXHAUSTED",
        "TENANT_QUOTA",
        "adapters: too many (limit 2 of a tenant), given 3; unregister one",
        retry=False,
    )
    acme.register("two", sources("lora-2"), replace=True)
    beta.register("three", sources("lora-1"))
    acme.unregister("one")
    acme.register("three", sources("lora-1"))


@pytest.mark.parametrize("limited", [("adapter_bytes_max", "pinned_bytes_max")], indirect=True)
def test_bytes(limited: tuple[LiveServer, Client, Client], sources: Sources) -> None:
    _, acme, beta = limited
    count = 0
    while count < 100:
        try:
            acme.register(f"one-{count}", sources(f"ia3-{count + 1}"))
        except Exception:
            break
        count += 1
    assert 1 <= count < 100
    refused(
        lambda: acme.register("more", sources("ia3-1")), "RESOURCE_EXHAUSTED", "TENANT_QUOTA", "adapter_bytes: too many"
    )
    refused(lambda: beta.register("l", sources("lora-1"), pin=True), "RESOURCE_EXHAUSTED", "TENANT_QUOTA", "unpin one")
    beta.register("l", sources("lora-1"))


@pytest.mark.parametrize("limited", [("requests_max", "uploads_max")], indirect=True)
def test_requests_and_uploads(limited: tuple[LiveServer, Client, Client], sources: Sources) -> None:
    live, acme, beta = limited
    with live.gate.held():
        streams = [acme.stream(None, 4) for _ in range(2)]
        wait_until(lambda: live.application.requests.admission.num_requests == 2)
        refused(lambda: acme.stream(None, 4), "RESOURCE_EXHAUSTED", "QUEUE_FULL", "requests of one tenant", retry=True)
        streams.append(beta.stream(None, 4))
        wait_until(lambda: live.application.requests.admission.num_requests == 3)
    assert all(stream.result().tokens for stream in streams)
    with live.application.lifecycle.tenant_quotas.upload("acme"):  # one that is being received
        refused(
            lambda: acme.upload(upload_messages("up", sources.parts("ia3-1").files())),
            "RESOURCE_EXHAUSTED",
            "TENANT_QUOTA",
            "uploads: too many",
            retry=True,
        )
    acme.upload(upload_messages("up", sources.parts("ia3-1").files()))


@pytest.mark.parametrize("limited", [("tokens_per_minute_max",)], indirect=True)
def test_tokens(limited: tuple[LiveServer, Client, Client]) -> None:
    _, acme, beta = limited
    for _ in range(3):
        acme.generate(None, 60, text="x" * 60)  # cached tokens cost nothing
    refused(lambda: acme.generate(None, 4), "RESOURCE_EXHAUSTED", "TENANT_QUOTA", "tokens_per_minute", retry=True)
    assert beta.tokens(None, 4)


def test_a_bucket_is_refilled_and_pays_back_what_was_used_too_much() -> None:
    bucket = TokenBucket(60, now_s=0.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.take(90)
    assert bucket.wait_s(0.0) == pytest.approx(30.0)
    assert bucket.wait_s(20.0) == pytest.approx(10.0)
    assert bucket.wait_s(31.0) == 0.0
    bucket.wait_s(1000.0)
    bucket.take(60)
    assert bucket.wait_s(1000.0) == 0.0, "a minute's, however long nothing was used"
    bucket.take(1)
    assert bucket.wait_s(1000.0) == pytest.approx(1.0)
