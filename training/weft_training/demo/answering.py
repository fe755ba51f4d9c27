"""Concurrent requests for many answers from a server."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from weft.client import AsyncClient

Target = str | Mapping[str, float] | None


class Ask(NamedTuple):
    """One request: its prompt or conversation, and the adapter that answers, or several with weights, or none."""

    prompt: str | Sequence[Mapping[str, str]]
    adapter: Target
    max_new_tokens: int


def answers(address: str, asks: Sequence[Ask], *, concurrent: int = 32) -> list[str]:
    """Return the greedy answers in the order of `asks`. Raises RpcFailure if one is refused.

    concurrent: requests at once; the server's queue is bounded.
    """

    async def all_answers() -> list[str]:
        free = asyncio.Semaphore(concurrent)
        async with AsyncClient(address) as client:

            async def answer(ask: Ask) -> str:
                async with free:
                    given = await client.generate(
                        ask.prompt, ask.adapter, temperature=0, max_new_tokens=ask.max_new_tokens
                    )
                    return given.text

            return await asyncio.gather(*map(answer, asks))

    return asyncio.run(all_answers())
