"""The interceptor that lets calls in: it identifies the caller and checks the role, before the request is read.

A refused call costs a regular expression, one sha256 and two lookups, whatever the caller sends. Its handler reads no
message, so a refused upload is not received either.
"""

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from weft.api.access.principal import ANYBODY, CALLER, Principal
from weft.api.access.requirements import PUBLIC, require
from weft.api.access.token import Token
from weft.api.access.tokens import Tokens
from weft.errors import PermissionDenied, Unauthenticated, WeftError

_HEADER, _SCHEME = "authorization", "bearer"


class AccessGate(grpc.aio.ServerInterceptor):
    """Refuses calls whose token is not in `tokens`, or lacks a role; None lets every caller in.

    refused: called with the reason of each refusal, on the event loop. Handlers find their caller in `CALLER`.
    """

    def __init__(self, tokens: Tokens | None, refused: Callable[[str], None]) -> None:
        self._tokens, self._refused = tokens, refused

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method in PUBLIC:
            return handler
        try:
            caller = ANYBODY if self._tokens is None else _identified(self._tokens, handler_call_details)
            require(caller, handler_call_details.method)
        except (Unauthenticated, PermissionDenied) as error:
            self._refused(error.reason)
            return _refusing(error)
        CALLER.set(caller)  # this task goes on to answer the call, and does nothing else
        return handler


def _identified(tokens: Tokens, call: grpc.HandlerCallDetails) -> Principal:
    """Return the caller that the authorization header identifies. Raises Unauthenticated."""
    headers = [value for key, value in call.invocation_metadata or () if key == _HEADER]
    if not headers:
        raise Unauthenticated.at("TOKEN_MISSING", _HEADER, "must be Bearer and a token of this server, given none")
    scheme, _, text = headers[0].partition(" ") if isinstance(headers[0], str) else ("", "", "")
    token = Token.parse(text)
    if len(headers) > 1 or scheme.lower() != _SCHEME or token is None:
        rule = "must be one header of the form Bearer weft_<id>_<secret>, given another form"
        raise Unauthenticated.at("TOKEN_MALFORMED", _HEADER, rule)
    caller = tokens.identify(token)
    if caller is None:
        raise Unauthenticated.at("TOKEN_INVALID", _HEADER, "the token is not one of this server's, or has expired")
    return caller


def _refusing(error: WeftError) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return a handler that fails. As one of streams it runs before the first message is received."""

    async def refuse(messages: object, context: object) -> NoReturn:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)
