"""The composition root: builds everything from a WeftConfig, serves until a signal, drains, exits.

start:   load the base → start the engine → read the store's manifests → listen → SERVING
SIGTERM: NOT_SERVING, new calls refused → running requests finish, up to drain_timeout_s → the rest end → exit 0
second signal, or one during the start: stop waiting
engine down or hung: NOT_SERVING, every request has ended with UNAVAILABLE → exit 1
"""

import asyncio
import logging
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grpc.aio
import torch
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection
from prometheus_client import disable_created_metrics
from rich.console import Console
from rich.progress import Progress

from weft import __version__
from weft.adapters.identifiers import AdapterId, check_adapter_id, in_tenant
from weft.adapters.ingest import Ingest
from weft.api import memory_plan
from weft.api.access.access import Access
from weft.api.access.principal import ANYBODY, CALLER
from weft.api.application import Application, ServedModel
from weft.api.bounds import bounds_of
from weft.api.exposition import Exposition
from weft.api.interceptors import FinishedCall, StatusInterceptor
from weft.api.servicers.adapters import AdapterServicer
from weft.api.servicers.generation import GenerationServicer
from weft.api.servicers.health import HealthServicer
from weft.api.watchdog import exit_at_once
from weft.config import GIB, WeftConfig
from weft.engine.runner import ModelRunner
from weft.kernels.selection import select
from weft.metrics import Metrics
from weft.model import loader, paged_attention, rope, self_test, serving_form, threads
from weft.v1 import adapter_service_pb2, adapter_service_pb2_grpc, generation_service_pb2, generation_service_pb2_grpc

_log = logging.getLogger(__name__)
_STREAMS_MAX = 1024  # of one connection
_CALLS_PENDING_MAX = 16 * _STREAMS_MAX  # so a few connections alone never reach it; a call that has begun takes 20 kB
_SERVICES = (
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A listening server. `port` and `metrics_port` are the real ones, also if 0 was configured."""

    application: Application
    access: Access
    port: int
    metrics_port: int


def run(config: WeftConfig, adapters: list[tuple[str, Path]]) -> int:
    """Serve until a signal; return the exit code. `adapters` are registered at the start, replacing older content."""
    logging.basicConfig(level=config.server.log_level.name, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold prompts
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # each connection is one
    Access(config.server, config.access, Metrics()).close()  # refuses in a moment what would be after loading
    console = Console(stderr=True)
    with console.status(f"loading {config.model.path} ({config.model.quantization.value}) …"):
        model, runner = build_model(config)
    base_model = model.base.shape.name
    named = [(check_adapter_id(adapter_id, base_model=base_model), path.resolve()) for adapter_id, path in adapters]
    config = replace(config, allowed_sources=(*config.allowed_sources, *(path for _, path in named)))
    code = asyncio.run(_serve_until_signal(config, model, runner, named, console))
    if code:
        exit_at_once(code)  # the engine's thread may hang
    return code


def build_model(config: WeftConfig) -> tuple[ServedModel, ModelRunner]:
    """Load the base and make its runner."""
    num_threads = config.model.num_threads or torch.get_num_threads()
    return threads.on_a_thread_that_ends(partial(_build_model, config, num_threads), num_threads=num_threads)


def _build_model(config: WeftConfig, num_threads: int) -> tuple[ServedModel, ModelRunner]:
    paged_attention.register()
    checkpoint = loader.read(config.model, attention=paged_attention.ATTENTION)
    weights = loader.WeightBytes.of(checkpoint.model)
    plan = _memory_plan(config, checkpoint)
    rope_factors = rope.fix(checkpoint.model, plan.max_model_len)
    expected = self_test.expect(checkpoint.model, max_model_len=plan.max_model_len)
    base = loader.wrap(replace(checkpoint, rope_factors=rope_factors.name))
    base = replace(base, max_model_len=plan.max_model_len)
    kernels = select(base.device, base.dtype)
    serving_form.take(base, kernels, shadow_bytes=config.model.shadow_bytes)
    self_test.require(base, expected, kernels.attend)
    runner = ModelRunner(
        base,
        num_kv_blocks=plan.num_kv_blocks,
        block_size=config.engine.block_size,
        adapter_bytes=config.residency.device_bytes,
        kernels=kernels,
        num_captured_rows=config.engine.max_num_seqs,
    )
    runner.warm_up()
    # Beside its virtual positions, an adapter needs room for one prompt token and one generated token.
    num_virtual_tokens_max = min(config.adapters.num_virtual_tokens_max, plan.max_model_len - 2)
    limits = replace(config.adapters, num_virtual_tokens_max=num_virtual_tokens_max)
    model = ServedModel(
        base=base,
        ingest=Ingest(base.shape, limits, base.dtype, pinned=base.device.type == "cuda"),
        kernels=kernels.name,
        plan=plan,
        num_threads=num_threads,
        weights=weights,
        rope_factors=str(rope_factors),
    )
    return model, runner


def _memory_plan(config: WeftConfig, checkpoint: loader.Checkpoint) -> memory_plan.MemoryPlan:
    device = checkpoint.model.device
    return memory_plan.make(
        config.engine,
        device=device.type,
        free=memory_plan.free_bytes(device, config.engine.memory_bytes) - config.model.shadow_bytes,
        adapters=config.residency.device_bytes,
        token_bytes=checkpoint.token_bytes,
        model_len=checkpoint.max_model_len,
    )


@asynccontextmanager
async def serving(
    config: WeftConfig,
    model: ServedModel,
    runner: ModelRunner,
    adapters: list[tuple[AdapterId, Path]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AsyncIterator[Serving]:
    """Yield a server that listens inside the block, and drain it at the end."""
    disable_created_metrics()  # they would add a useless second series to each counter
    metrics = Metrics()
    access = Access(config.server, config.access, metrics)
    access.start()
    application = Application(config, model, runner, metrics)
    health = HealthServicer(_SERVICES)
    server = _server(config, application, health, access)
    try:
        port = _listen(server, config, access)
        exposition = _expose(metrics, config, health, access)
    except BaseException:
        await application.stop()
        access.close()
        raise
    exposition.start()
    try:
        await application.start(adapters, progress)
        _record_start(access, application, adapters)
        await server.start()
        health.serve()
        watch_down = asyncio.create_task(_follow_engine(application, health))
        try:
            yield Serving(application=application, access=access, port=port, metrics_port=exposition.server_address[1])
        finally:
            watch_down.cancel()
            health.retire()
            if not await application.drain(config.server.drain_timeout_s):
                _log.warning("drain: requests were left after %g s; they end now", config.server.drain_timeout_s)
    finally:
        await application.stop()
        health.end()
        await server.stop(grace=1.0)
        exposition.close()
        access.record("stop")
        access.close()


def _record_start(access: Access, application: Application, adapters: list[tuple[AdapterId, Path]]) -> None:
    registry = application.lifecycle.registry
    access.record("start", version=__version__, base=application.model.base.shape.digest, num_adapters=len(registry))
    for adapter_id, _ in adapters:  # those of the command line
        access.record("register", adapter_id=adapter_id, after=_digest_of(application, adapter_id))


def _digest_of(application: Application, adapter_id: str) -> str:
    """Return the current digest of an adapter that the caller names, or ""."""
    inner = in_tenant(CALLER.get(ANYBODY).tenant, AdapterId(adapter_id))
    version = application.lifecycle.registry.published(inner)
    return "" if version is None else version.digest


def _server(config: WeftConfig, application: Application, health: HealthServicer, access: Access) -> grpc.aio.Server:
    metrics = application.metrics

    def observe(call: FinishedCall) -> None:
        rpc = call.method.rpartition("/")[2]
        metrics.rpcs.labels(rpc, call.code).inc()
        metrics.rpc_seconds.labels(rpc).observe(call.duration_s)

    bounds = bounds_of(config.requests, config.adapters, application.model.base.max_model_len)
    interceptor = StatusInterceptor(
        observe, require=bounds.require, write_timeout_s=config.server.stream_write_timeout_s
    )
    server = grpc.aio.server(
        interceptors=[interceptor, *access.interceptors(partial(_digest_of, application))],
        options=[
            ("grpc.max_receive_message_length", config.server.receive_bytes_max),
            ("grpc.max_metadata_size", 8 * 1024),
            # Connections are as good as their clients: dead ones are found by pings, and silent ones are closed.
            ("grpc.max_allowed_incoming_connections", _connections_max(config)),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 15 * 60 * 1000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_concurrent_streams", _STREAMS_MAX),
            # Above this many calls that no handler has begun, gRPC cancels some at random, those of other callers too.
            ("grpc.server.max_pending_requests", _CALLS_PENDING_MAX),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _CALLS_PENDING_MAX),
            ("grpc.so_reuseport", 0),  # a second server on the port must fail instead of sharing it silently
        ],
    )
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(application), server)
    adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(application), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if config.server.reflection:
        reflection.enable_server_reflection((*_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    return server


def _connections_max(config: WeftConfig) -> int:
    """Return the connections that leave descriptors for the adapters' files and the server's own."""
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return config.server.connections_max if most_files < 0 else min(config.server.connections_max, most_files * 3 // 4)


def _listen(server: grpc.aio.Server, config: WeftConfig, access: Access) -> int:
    host = config.server.host
    address = f"[{host}]:{config.server.port}" if ":" in host and host[0] != "[" else f"{host}:{config.server.port}"
    try:
        if access.certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, access.certificates.credentials())
    except RuntimeError as error:
        raise OSError(f"port: cannot listen on {address}; is it taken?") from error


def _expose(metrics: Metrics, config: WeftConfig, health: HealthServicer, access: Access) -> Exposition:
    host, port = config.server.metrics_host, config.server.metrics_port
    try:
        return Exposition(host, port, metrics.registry, lambda: health.is_serving, access.admits_scrape)
    except OSError as error:
        raise OSError(f"metrics_port: cannot listen on {host}:{port}; is it taken?") from error


async def _follow_engine(application: Application, health: HealthServicer) -> None:
    await application.down.wait()
    health.retire()


async def _serve_until_signal(
    config: WeftConfig,
    model: ServedModel,
    runner: ModelRunner,
    adapters: list[tuple[AdapterId, Path]],
    console: Console,
) -> int:
    loop, main, asked = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    assert main is not None
    serves = False

    def on_signal() -> None:
        if asked.is_set() or not serves:
            main.cancel()  # the second signal, or a start that is called off: do not wait
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    is_down = asyncio.Event()
    with ExitStack() as shown:
        bar = shown.enter_context(Progress(console=console, transient=True))
        show = partial(bar.update, bar.add_task("restoring adapters", total=None))
        try:
            async with serving(
                config, model, runner, adapters, lambda done, total: show(completed=done, total=total)
            ) as served:
                shown.close()
                serves = True
                is_down = served.application.down
                if served.access.tokens is not None:
                    loop.add_signal_handler(signal.SIGHUP, served.access.hurry)
                _announce(console, config, model, served)
                waits = [asyncio.create_task(asked.wait()), asyncio.create_task(is_down.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                console.print("draining …" if asked.is_set() else "[red]the engine is down[/red]")
        except asyncio.CancelledError:
            console.print("not waiting any longer")
    return 1 if is_down.is_set() else 0


def _announce(console: Console, config: WeftConfig, model: ServedModel, served: Serving) -> None:
    base, host = model.base, config.server.host
    otherwise = [version for version in served.application.lifecycle.registry if version.info.trained_held_as]
    console.print(
        f"[bold]weft[/bold] serves [bold]{base.shape.name}[/bold] ({base.quantization.value}, {model.dtype}, "
        f"{base.device.type}, kernels {model.kernels}) with {len(served.application.lifecycle.registry)} adapters"
        f"{f', {len(otherwise)} of them trained on another quantization' if otherwise else ''}\n"
        f"  gRPC     {host}:{served.port}\n"
        f"  metrics  http://{config.server.metrics_host}:{served.metrics_port}/metrics\n"
        f"  store    {config.store}\n"
        + (f"  access   {protection}\n" if (protection := served.access.described()) else "")
        + "".join(f"  {line}\n" for line in _about_memory(model, config))
        + "ready",
        highlight=False,
    )


def _about_memory(model: ServedModel, config: WeftConfig) -> Iterator[str]:
    """Yield lines about the use of memory, and its effects that an operator might not expect."""
    plan, (quantized, unquantized, experts) = model.plan, model.weights
    text = f"{(quantized + unquantized) / GIB:.2f} GiB"
    if quantized:
        text += f": {quantized / GIB:.2f} {model.base.quantization.value}, {unquantized / GIB:.2f} {model.dtype}"
        if experts:
            text += f" ({experts / GIB:.2f} of it experts, which bitsandbytes does not quantize)"
    yield f"weights  {text}"
    yield f"adapters {plan.adapters / GIB:.2f} GiB at most"
    yield f"KV cache {plan.kv / GIB:.2f} GiB, {plan.num_kv_blocks} blocks of {config.engine.block_size} tokens"
    yield f"left     {plan.left / GIB:.2f} GiB"
    yield f"context  {plan.max_model_len} tokens" + (f", cut {plan.fitted}" if plan.fitted else "")
    if model.rope_factors:
        yield f"RoPE     {model.rope_factors}"
