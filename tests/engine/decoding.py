"""Requests that decode step by step through a runner, without an engine: the test chooses every token that is fed."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.slots import AdapterSlot
from weft.engine.batch import Stepper
from weft.engine.block_manager import BlockManager
from weft.engine.request import (
    AdapterUse,
    ExpertBound,
    GateDetail,
    Gates,
    MixtureUse,
    Request,
    RequestId,
    SamplingParams,
    canonical,
)
from weft.engine.runner import ModelRunner
from weft.engine.scheduler import Scheduled
from weft.kernels.selection import Kernels
from weft.kernels.step import Step
from weft.methods.mixture import Level, Mixture
from weft.methods.protocol import Adapter
from weft.model.loader import Base

BLOCK_SIZE = 16


class Part(NamedTuple):
    """An adapter of a request, and its weight."""

    adapter: Adapter
    gate: float


class Blend(NamedTuple):
    """The mixture of a request: the experts in its order, the router, and the request's steering."""

    experts: Sequence[Adapter]
    mixture: Mixture
    bounds: tuple[ExpertBound, ...] = ()


Taken = Sequence[Part] | Blend


class Decoding:
    """A runner and its requests."""

    def __init__(self, base: Base, kernels: Kernels, *, num_captured_rows: int = 0, num_kv_blocks: int = 256) -> None:
        self.base = base
        self.blocks = BlockManager(num_kv_blocks, BLOCK_SIZE, enable_prefix_caching=False)
        self.runner = ModelRunner(
            base,
            num_kv_blocks=num_kv_blocks,
            block_size=BLOCK_SIZE,
            adapter_bytes=1 << 28,
            kernels=kernels,
            num_captured_rows=num_captured_rows,
        )
        self.requests: list[Request] = []
        self._stepper = Stepper(self.runner, BLOCK_SIZE)
        self._slots: dict[Request, tuple[AdapterSlot, ...]] = {}

    def start(self, requests: Sequence[Taken]) -> None:
        """Place all adapters and compute all prompts, in one step; prompts have different lengths."""
        for index, taken in enumerate(requests):
            parts = [Part(expert, 1.0) for expert in taken.experts] if isinstance(taken, Blend) else taken
            made, virtual_blocks = {}, []
            for number, part in enumerate(parts):
                laid_out = packed_adapter.build(part.adapter, self.base.shape, dtype=self.base.dtype)
                slot = self.runner.slots.put(laid_out)
                assert slot is not None
                if laid_out.virtual is not None:
                    blocks = self.blocks.take_virtual(laid_out.num_virtual_tokens)
                    assert blocks is not None
                    virtual_blocks += blocks
                    self.runner.write_virtual(blocks, laid_out.virtual)
                use = AdapterUse(AdapterDigest(f"{index}-{number:03}"), part.gate, laid_out.num_virtual_tokens)
                made[use] = slot
            uses = canonical(made)
            slots = [made[use] for use in uses]
            mixture = None
            if isinstance(taken, Blend):
                slot = self.runner.slots.put(packed_adapter.build_router(taken.mixture))
                assert slot is not None
                slots.append(slot)
                reads_prompt = taken.mixture.config.level is Level.SEQUENCE
                mixture = MixtureUse(AdapterDigest(str(index)), reads_prompt, taken.bounds, GateDetail.TOKENS)
            request = Request(
                request_id=RequestId(str(index)),
                prompt_token_ids=tuple(2 + (7 * index + place) % 90 for place in range(1 + index % 23)),
                params=SamplingParams(),
                adapters=uses,
                mixture=mixture,
                virtual_blocks=virtual_blocks,
            )
            self.requests.append(request)
            self._slots[request] = tuple(slots)
        self._compute(self.requests)

    def step(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Feed the next token to all requests, or to those `chosen`; return their logits [B, V], which stay valid."""
        requests = self.requests if chosen is None else [self.requests[index] for index in chosen]
        for request in requests:
            request.output.append(2 + (11 * request.num_tokens + int(request.request_id)) % 90)
        return self._compute(requests)

    def end(self) -> list[Gates | None]:
        """Remove all requests with their adapters; return the gates of mixtures on their tokens."""
        gates = [self._stepper.mixtures.end(request) for request in self.requests]
        for request in self.requests:
            self.blocks.release(request)
            self.blocks.drop_virtual(request.virtual_blocks)
            for slot in self._slots.pop(request):
                self.runner.slots.drop(slot)
        self.requests = []
        return gates

    def pool_keys(self) -> Sequence[Tensor]:
        """Return the keys of the pool, layer by layer."""
        return self.runner._cache.keys

    def built(self, requests: Sequence[Request]) -> Step:
        """Return the step that computes all tokens of the requests that are not computed yet."""
        return self._stepper.build(self._scheduled(requests), self._slots)

    def _scheduled(self, requests: Sequence[Request]) -> list[Scheduled]:
        scheduled = []
        for request in requests:
            assert self.blocks.grow(request, request.num_tokens)
            scheduled.append(Scheduled(request, request.num_tokens - request.num_computed_tokens))
        return scheduled

    def _compute(self, requests: Sequence[Request]) -> Tensor:
        logits = self._stepper.compute(self._scheduled(requests), self._slots)
        for request in requests:
            request.num_computed_tokens = request.num_tokens
        return logits.clone()
