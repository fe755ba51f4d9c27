"""Clients of a Weft server: `Client` for threads, `AsyncClient` for asyncio, with the same methods.

    with Client("127.0.0.1:50051") as client:
        client.upload("reverse", "runs/reverse")
        print(client.generate("warp", adapter="reverse", max_new_tokens=8).text)
        with client.stream("warp", adapter={"reverse": 0.5, "upper": 0.5}, temperature=0.0) as answer:
            for delta in answer:
                print(delta.text, end="")
        print(answer.finish.usage.completion_tokens)

All calls are defined once, in `weft.client.calls`; the two clients differ only in how they make them. Answers are
messages of `weft.v1`, whose protos document each field. A call that fails raises RpcFailure.

A server with tokens or TLS needs `Credentials`; by default they are those of the environment (WEFT_TOKEN, WEFT_TLS_CA).

Answers and `watch` have no deadline unless one is given; other calls have a minute. gRPC itself repeats unary calls
that are safe to repeat, and only after UNAVAILABLE.
"""

from weft.client.aio import AsyncClient, AsyncDeltas, AsyncWatch
from weft.client.calls import Completion, Parameters
from weft.client.credentials import Credentials
from weft.client.failure import Failure
from weft.client.threads import Client, Deltas, Watch
from weft.client.wire import RpcFailure

__all__ = [
    "AsyncClient",
    "AsyncDeltas",
    "AsyncWatch",
    "Client",
    "Completion",
    "Credentials",
    "Deltas",
    "Failure",
    "Parameters",
    "RpcFailure",
    "Watch",
]
