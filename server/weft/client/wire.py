"""Parts that both clients share: the connection and its calls, the exception, and the messages of an answer."""

import inspect
import json
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from weft.client.calls import Rpc, Stubs
from weft.client.credentials import Credentials, is_this_machine
from weft.client.failure import Failure
from weft.v1 import adapter_service_pb2, generation_service_pb2
from weft.v1.generation_pb2 import Delta, Finish, StreamGenerateResponse

P = ParamSpec("P")
Method = TypeVar("Method", bound=Callable[..., Any])
Answer = TypeVar("Answer")
Result = TypeVar("Result")

_RECEIVE_BYTES_MAX = 64 << 20  # Tokenize with pieces exceeds gRPC's own 4 MiB
_NOT_REPEATABLE = frozenset({"UnregisterAdapter"})  # a repeated call would fail, because the adapter is gone
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


class RpcFailure(Exception):
    """A call that failed; `failure` has the code, the reason that programs compare, and the retry delay if any."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.reason or failure.code.name}: {failure.message}")
        self.failure = failure


class Connection:
    """A channel of grpc or grpc.aio, and the deadline and credentials that its user set for every call."""

    def __init__(self, server: str, timeout_s: float | None, credentials: Credentials | None, grpc_module: Any) -> None:
        self.server = server
        self.timeout_s = timeout_s
        self.credentials = Credentials.from_environment() if credentials is None else credentials
        of_channel, options = self.credentials.for_channel(server), channel_options()
        if is_this_machine(server):  # or else gRPC would send a token in plain text to the proxy of http_proxy
            options.append(("grpc.enable_http_proxy", 0))
        if of_channel is None:
            self._channel = grpc_module.insecure_channel(server, options=options)
        else:
            self._channel = grpc_module.secure_channel(server, of_channel, options=options)
        self._stubs: Any = Stubs.on(self._channel)

    def begin(self, rpc: Rpc[Any]) -> Any:
        """Begin gRPC's call for `rpc`."""
        timeout_s, metadata = rpc.deadline_s(self.timeout_s), self.credentials.metadata
        return rpc.method(self._stubs)(rpc.request, timeout=timeout_s, metadata=metadata)


class Reading:
    """A stream that is being read; leaving its context ends the call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def close(self) -> None:
        """End the call; the server stops working on it."""
        self._call.cancel()


class Answering:
    """Fields of an answer's messages besides their deltas."""

    request_id = ""
    _finish: Finish | None = None

    @property
    def finish(self) -> Finish:
        """How the answer ended. Raises RuntimeError before it has been read to its end."""
        if self._finish is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._finish

    def _new_in(self, message: StreamGenerateResponse) -> list[Delta]:
        self.request_id = self.request_id or message.request_id
        if message.HasField("finish"):
            self._finish = message.finish
        return [message.delta] if message.HasField("delta") else []


def channel_options() -> list[tuple[str, Any]]:
    """Return retries for the repeatable unary calls, and room for large answers."""
    services = (
        generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"],
        adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    )
    repeatable = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if not (method.client_streaming or method.server_streaming or method.name in _NOT_REPEATABLE)
    ]
    config = {"methodConfig": [{"name": repeatable, "retryPolicy": _RETRY_POLICY}]}
    return [("grpc.service_config", json.dumps(config)), ("grpc.max_receive_message_length", _RECEIVE_BYTES_MAX)]


def method(
    described: Callable[P, Rpc[Answer]], run: Callable[[Any, Rpc[Answer]], Result]
) -> Callable[Concatenate[Any, P], Result]:
    """Return a client's method that runs the described call."""

    def called(client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return run(client, described(*args, **kwargs))

    return documented(called, described)


def documented(method: Method, described: Callable[..., Any]) -> Method:
    """Give a client's method the name, docstring and, after `self`, parameters of the function that describes it."""
    signature = inspect.signature(described)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    documented: Any = method
    documented.__name__, documented.__doc__ = described.__name__, described.__doc__
    documented.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return method
