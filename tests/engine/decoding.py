"""Requests that decode step by step through a runner, without an engine: the test chooses every token that is fed."""

from collections.abc import Sequence

from torch import Tensor

from tests.mixing.textbook_composition import Composition
from tests.serving import Row, Serving
from weft.engine.request import Gates, Request
from weft.kernels.step import Step


class Decoding(Serving):
    """A runner and its requests."""

    requests: Sequence[Request] = ()

    def start(self, taken: Sequence[Row | Composition]) -> None:
        """Place all adapters and compute all prompts, in one step; prompts have different lengths.

        taken: by request, a row whose tokens are not read, or a composition; () is the base.
        """
        rows = [one if isinstance(one, Row) else Row((), adapters=one) for one in taken]
        prompts = [[2 + (7 * index + place) % 90 for place in range(1 + index % 23)] for index in range(len(rows))]
        self.requests = [
            self.place(index, row._replace(tokens=prompt))
            for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]
        self._compute(self.requests)

    def step(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Feed the next token to all requests, or to those `chosen`; return their logits [B, V], which stay valid."""
        requests = self.requests if chosen is None else [self.requests[index] for index in chosen]
        for request in requests:
            request.output.append(2 + (11 * request.num_tokens + int(request.request_id)) % 90)
        return self._compute(requests)

    def end(self) -> list[Gates | None]:
        """Remove all requests with their adapters; return the gates of mixtures on their tokens."""
        requests, self.requests = self.requests, ()
        return self.remove(requests)

    def pool_keys(self) -> Sequence[Tensor]:
        """Return the keys of the pool, layer by layer."""
        return self.runner._cache.keys

    def built(self, requests: Sequence[Request]) -> Step:
        """Return the step that computes all tokens of the requests that are not computed yet."""
        return self.stepper.build(self.schedule(requests), self.slots_of)

    def _compute(self, requests: Sequence[Request]) -> Tensor:
        logits = self.stepper.compute(self.schedule(requests), self.slots_of)
        for request in requests:
            request.num_computed_tokens = request.num_tokens
        return logits.clone()
