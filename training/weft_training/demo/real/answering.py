"""Concurrent requests for many answers from a server."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from weft.client import AsyncClient

_CONCURRENT = 32  # more would fill the server's queue, which is bounded


Target = str | Mapping[str, float] | None


class Ask(NamedTuple):
    """One request: the turns of a conversation, and the adapter that answers, or several with weights, or none."""

    messages: Sequence[Mapping[str, str]]
    adapter: Target
    max_new_tokens: int


async def answers(address: str, asks: Sequence[Ask]) -> list[str]:
    """Return the greedy answers in the order of `asks`. Raises RpcFailure if one is refused."""
    free = asyncio.Semaphore(_CONCURRENT)
    async with AsyncClient(address) as client:

        async def answer(ask: Ask) -> str:
            async with free:
                given = await client.generate(
                    ask.messages,
                    ask.adapter,
                    temperature=0,
                    max_new_tokens=ask.max_new_tokens,
                )
                return given.text

        return await asyncio.gather(*(answer(ask) for ask in asks))
