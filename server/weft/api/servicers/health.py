"""grpc.health.v1: whether the services are serving.

The contract is that of grpcio-health-checking; the servicer is ours. Theirs forgets every watcher of a service when one
of them leaves, and lets the rest be cancelled when the server stops, which grpc logs as errors.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.errors import draining_error

Status = health_pb2.HealthCheckResponse.ServingStatus


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Health of `services` and, under the name "", of the server: SERVING from `serve` to `retire`."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._status: Status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._has_retired = self._has_ended = False
        self._changed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Whether everything is SERVING. Any thread may ask."""
        return self._status == health_pb2.HealthCheckResponse.SERVING

    def serve(self) -> None:
        """Make everything SERVING, unless it has retired meanwhile."""
        if not self._has_retired:
            self._change(health_pb2.HealthCheckResponse.SERVING)

    def retire(self) -> None:
        """Make everything NOT_SERVING, for good."""
        self._has_retired = True
        self._change(health_pb2.HealthCheckResponse.NOT_SERVING)

    def end(self) -> None:
        """End all watches, because the server stops."""
        self._has_ended = True
        self._change(self._status)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Return the status now. Aborts with NOT_FOUND for an unknown service."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "service: is none of this server's")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Yield the status now and at every change, until the server stops."""
        sent = None
        while not self._has_ended:
            changed = self._changed
            is_known = request.service in self._services
            status = self._status if is_known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            await changed.wait()
        raise draining_error()

    def _change(self, status: Status) -> None:
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()
