"""Run adapters through the serving path (paged attention, slots, kernels) without a server."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot
from weft.engine.batch import Stepper
from weft.engine.block_manager import BlockManager
from weft.engine.request import (
    AdapterDigest,
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
from weft.engine.token_ranges import Ranges
from weft.kernels.selection import REFERENCE, Kernels, select
from weft.methods.mixture import Level, Mixture
from weft.methods.protocol import Adapter
from weft.model.loader import Base

BLOCK_SIZE = 16


def selected(base: Base) -> Kernels:
    """Return the fast kernels for a base, which must be there: what tests promise of them is not the reference's."""
    kernels = select(base.device, base.dtype)
    assert kernels is not REFERENCE
    return kernels


def error(got: Tensor, wanted: Tensor) -> float:
    """Return ‖got - wanted‖ over ‖wanted‖."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Row(NamedTuple):
    """One request of a step: its tokens and its adapter (None: the base), or its adapters with their gates.

    ranges: where each of the adapters acts; () is everywhere.
    Of a mixture the adapters are the experts, in its order, and `bounds` what the request wants of their gates.
    """

    tokens: Sequence[int]
    adapter: Adapter | None = None
    adapters: Sequence[tuple[Adapter, float]] = ()
    ranges: Sequence[Ranges] = ()
    mixture: Mixture | None = None
    bounds: tuple[ExpertBound, ...] = ()

    @property
    def parts(self) -> Sequence[tuple[Adapter, float]]:
        return self.adapters if self.adapter is None else ((self.adapter, 1.0),)


class Serving:
    """A runner without an engine: places rows as requests, and removes them."""

    def __init__(self, base: Base, kernels: Kernels, *, num_kv_blocks: int = 256, num_captured_rows: int = 0) -> None:
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
        self.stepper = Stepper(self.runner, BLOCK_SIZE)
        self.slots_of: dict[Request, tuple[AdapterSlot, ...]] = {}

    def place(self, index: int, row: Row) -> Request:
        """Put a row's adapters into slots and its virtual positions into blocks, and return its request."""
        made: dict[AdapterUse, AdapterSlot] = {}
        virtual_blocks: list[int] = []
        for part, (adapter, gate) in enumerate(row.parts):
            laid_out = packed_adapter.build(adapter, self.base.shape, dtype=self.base.dtype)
            ranges = row.ranges[part] if row.ranges else ()
            named = AdapterDigest(f"{index}-{part:03}")
            made[AdapterUse(named, gate, laid_out.num_virtual_tokens, ranges)] = self._put(laid_out)
            if laid_out.virtual is not None:
                taken = self.blocks.take_virtual(laid_out.num_virtual_tokens)
                assert taken is not None
                virtual_blocks += taken
                self.runner.write_virtual(taken, laid_out.virtual)
        uses = canonical(made)
        slots = [made[use] for use in uses]
        mixture = None
        if row.mixture is not None:
            slots.append(self._put(packed_adapter.build_router(row.mixture)))
            reads_prompt = row.mixture.config.level is Level.SEQUENCE
            mixture = MixtureUse(AdapterDigest(f"{index}"), reads_prompt, row.bounds, GateDetail.TOKENS)
        request = Request(
            request_id=RequestId(str(index)),
            prompt_token_ids=tuple(row.tokens),
            params=SamplingParams(),
            adapters=uses,
            mixture=mixture,
            virtual_blocks=virtual_blocks,
        )
        self.slots_of[request] = tuple(slots)
        return request

    def schedule(self, requests: Sequence[Request]) -> list[Scheduled]:
        """Schedule all tokens of the requests that are not computed yet."""
        for request in requests:
            assert self.blocks.grow(request, request.num_tokens)
        return [Scheduled(request, request.num_tokens - request.num_computed_tokens) for request in requests]

    def remove(self, requests: Sequence[Request]) -> list[Gates | None]:
        """Remove requests with their adapters; return the gates that their mixtures made on their tokens."""
        gates = [self.stepper.mixtures.end(request) for request in requests]
        for request in requests:
            self.blocks.release(request)
            self.blocks.unshare_virtual(request)
            for slot in self.slots_of.pop(request):
                self.runner.slots.drop(slot)
        return gates

    def _put(self, packed: PackedAdapter) -> AdapterSlot:
        slot = self.runner.slots.put(packed)
        assert slot is not None
        return slot


class Step(Serving):
    """Computes whole prompts in one step, as the engine would, and returns the logits of every position.

    gates: those that mixtures made in the last step, by row.
    """

    gates: dict[int, Gates | None]

    def logits(
        self,
        rows: Sequence[Row],
        around: AbstractContextManager[object] | None = None,
        *,
        last_only: bool = False,
    ) -> list[Tensor]:
        """Return logits [tokens, V] of each row, or of its last token; `around` is entered for the model call alone."""
        requests = [self.place(index, row) for index, row in enumerate(rows)]
        scheduled = self.schedule(requests)
        step = self.stepper.build(scheduled, self.slots_of)
        if not last_only:
            step = step._replace(sample_rows=torch.arange(step.num_rows))
        with around or nullcontext():
            flat = self.runner.forward(step)
        if step.routing is not None:
            self.stepper.mixtures.record(scheduled, step.routing)
        gates = self.remove(requests)
        self.gates = {} if step.routing is None else dict(enumerate(gates))
        return list(flat.split([1 if last_only else len(row.tokens) for row in rows]))
