"""A client that sends a token with every call."""

from typing import Any, NamedTuple

import grpc

from tests.access.conftest import bearer
from tests.server.live import Client
from weft.api.access.token import Token


class _Call(NamedTuple):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: Any = None
    wait_for_ready: bool | None = None
    compression: Any = None


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Adds a token to every call."""

    def __init__(self, token: Token) -> None:
        self._metadata = bearer(token)

    def _with_token(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_Call(details.method, details.timeout, self._metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _with_token


def client_of(port: int, token: Token) -> Client:
    """Return a client, with a connection of its own, of whoever has this token."""
    client = Client(port, options=[("grpc.use_local_subchannel_pool", 1)])
    channel = grpc.intercept_channel(client.channel, _Bearer(token))
    client.channel = channel
    client.generation, client.adapters = type(client.generation)(channel), type(client.adapters)(channel)
    return client
