"""Runs adapters through the serving path (paged attention, slots, kernels) without a server."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.slots import AdapterSlot
from weft.config import ModelConfig, Quantization
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
)
from weft.engine.runner import ModelRunner
from weft.engine.scheduler import Scheduled
from weft.engine.token_ranges import Ranges
from weft.kernels.selection import Kernels
from weft.methods.mixture import Level, Mixture
from weft.methods.protocol import Adapter
from weft.model import loader, paged_attention
from weft.model.loader import Base

BLOCK_SIZE = 16


def load(path: Path) -> loader.Base:
    """Load a base as a server does, unquantized in float32."""
    paged_attention.register()
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    return loader.load(config, attention=paged_attention.ATTENTION)


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


class Step:
    """Computes whole prompts in one step, as the engine would, and returns the logits of every position.

    gates: those that mixtures made in the last step, by row.
    """

    def __init__(self, base: Base, kernels: Kernels, *, num_kv_blocks: int = 256) -> None:
        self.base = base
        self.blocks = BlockManager(num_kv_blocks, BLOCK_SIZE, enable_prefix_caching=False)
        self.runner = ModelRunner(
            base, num_kv_blocks=num_kv_blocks, block_size=BLOCK_SIZE, adapter_bytes=1 << 28, kernels=kernels
        )

    def logits(
        self,
        rows: Sequence[Row],
        around: AbstractContextManager[object] | None = None,
        *,
        last_only: bool = False,
    ) -> list[Tensor]:
        """Return logits [tokens, V] of each row, or of its last token; `around` is entered for the model call alone."""
        slots, scheduled, slots_of = [], [], {}
        stepper = Stepper(self.runner, BLOCK_SIZE)
        self.gates: dict[int, Gates | None] = {}
        for index, row in enumerate(rows):
            uses: list[AdapterUse] = []
            request_slots: list[AdapterSlot] = []
            virtual_blocks: list[int] = []
            for part, (adapter, gate) in enumerate(row.parts):
                laid_out = packed_adapter.build(adapter, self.base.shape, dtype=self.base.dtype)
                slot = self.runner.slots.put(laid_out)
                assert slot is not None
                request_slots.append(slot)
                ranges = row.ranges[part] if row.ranges else ()
                named = AdapterDigest(f"{index}-{part:03}")
                uses.append(AdapterUse(named, gate, laid_out.num_virtual_tokens, ranges))
                if laid_out.virtual is not None:
                    taken = self.blocks.take_virtual(laid_out.num_virtual_tokens)
                    assert taken is not None
                    virtual_blocks += taken
                    self.runner.write_virtual(taken, laid_out.virtual)
            mixture = None
            if row.mixture is not None:
                slot = self.runner.slots.put(packed_adapter.build_router(row.mixture))
                assert slot is not None
                request_slots.append(slot)
                reads_prompt = row.mixture.config.level is Level.SEQUENCE
                mixture = MixtureUse(AdapterDigest(f"{index}"), reads_prompt, row.bounds, GateDetail.TOKENS)
            slots += request_slots
            request = Request(
                request_id=RequestId(str(index)),
                prompt_token_ids=tuple(row.tokens),
                params=SamplingParams(),
                adapters=tuple(uses),
                mixture=mixture,
                virtual_blocks=virtual_blocks,
            )
            assert self.blocks.grow(request, len(row.tokens))
            scheduled.append(Scheduled(request, len(row.tokens)))
            slots_of[request] = tuple(request_slots)
        step = stepper.build(scheduled, slots_of)
        if not last_only:
            step = step._replace(sample_rows=torch.arange(step.num_rows))
        with around or nullcontext():
            flat = self.runner.forward(step)
        if step.routing is not None:
            stepper.mixtures.record(scheduled, step.routing)
            self.gates = {index: stepper.mixtures.end(request) for index, request in enumerate(slots_of)}
        for request in slots_of:
            self.blocks.release(request)
            self.blocks.unshare_virtual(request)
        for slot in slots:
            self.runner.slots.drop(slot)
        return list(flat.split([1 if last_only else len(row.tokens) for row in rows]))
