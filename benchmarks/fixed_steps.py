"""Work that is the same every time it is asked for, so that only who computes it makes a difference.

A step writes keys and values where it wrote them before, and reads what it read before: it may be computed again and
again, and its logits are the same.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from benchmarks import models
from benchmarks.models import prompts
from weft.adapters import slab
from weft.adapters.identifiers import Generation
from weft.adapters.slots import AdapterSlot
from weft.config import EngineConfig
from weft.engine import batch as batches
from weft.engine.batch import Batch
from weft.engine.block_manager import BlockManager, cache_root
from weft.engine.engine import Engine, EngineCallbacks
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams, TokenEvent
from weft.engine.runner import ModelRunner
from weft.engine.scheduler import Scheduled
from weft.kernels.selection import Kernels
from weft.methods.protocol import Adapter
from weft.metrics import Metrics
from weft.model.loader import Base

NUM_ROWS = 16
NUM_CONTEXT = 64
NUM_PROMPT = 1024
RANK = 8
_BLOCK_SIZE = 16
_ADAPTER_BYTES = 1 << 28


class Rows(NamedTuple):
    """Adapters of rows, one for each, and those that are on the device while no row has them."""

    adapters: Sequence[Adapter]
    resident: Sequence[Adapter] = ()


def loras(base: Base) -> Rows:
    """A LoRA on every linear module, another one for each row."""
    return Rows([models.made(models.lora_of(RANK), base.shape, seed) for seed in range(NUM_ROWS)])


def one_lora(base: Base) -> Rows:
    """The first of `loras` alone: a row for whom every call counts."""
    return Rows([models.made(models.lora_of(RANK), base.shape, 0)])


def loras_at_q(base: Base) -> Rows:
    """LoRAs on q_proj alone, while adapters of every kind are resident that act elsewhere."""
    whole = loras(base).adapters
    kinds = models.IA3, models.PREFIX, models.BOTTLENECK
    return Rows(
        adapters=[_within(adapter, "q_proj") for adapter in whole],
        resident=[whole[0], *(models.made(kind, base.shape, 0) for kind in kinds)],
    )


def _within(adapter: Adapter, suffix: str) -> Adapter:
    sites = {name: params for name, params in adapter.sites.items() if name.endswith(suffix)}
    return replace(adapter, config=replace(adapter.config, target_modules=(suffix,)), sites=sites)


class FixedSteps:
    """A decode step of rows with NUM_CONTEXT tokens before them, and a prompt of NUM_PROMPT with the first adapter."""

    def __init__(self, base: Base, kernels: Kernels, given: Rows) -> None:
        adapters, resident = given
        num_tokens = [*[NUM_CONTEXT + 1] * len(adapters), NUM_PROMPT]
        num_blocks = sum(-(-count // _BLOCK_SIZE) for count in num_tokens)
        self._blocks = BlockManager(num_blocks, _BLOCK_SIZE, enable_prefix_caching=False)
        self._runner = ModelRunner(
            base,
            num_kv_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
            adapter_bytes=_ADAPTER_BYTES,
            kernels=kernels,
            num_recorded_rows=len(adapters),
        )
        self._runner.warm_up()
        slots = [self._place(base, adapter) for adapter in (*adapters, *resident)]
        rows = [
            _request(f"row {index}", prompt, index) for index, prompt in enumerate(prompts(len(adapters), NUM_CONTEXT))
        ]
        prompt = _request("prompt", prompts(1, NUM_PROMPT)[0], 0)
        slots_of = dict(zip([*rows, prompt], [*slots[: len(rows)], slots[0]], strict=True))
        self._runner.forward(self._batch(rows, slots_of))
        for request in rows:
            request.num_computed_tokens = request.num_tokens
            request.output.append(1)
        self._decode, self._prompt = self._batch(rows, slots_of), self._batch([prompt], slots_of)
        self.decode()  # records it

    def decode(self) -> Tensor:
        """The logits of the decode step [rows, V], until the next step."""
        return self._runner.forward(self._decode)

    def prefill(self) -> Tensor:
        """The logits of the prompt's last token [1, V]."""
        return self._runner.forward(self._prompt)

    def _place(self, base: Base, adapter: Adapter) -> AdapterSlot:
        slot = self._runner.slots.put(slab.build(adapter, base.shape, dtype=base.dtype))
        assert slot is not None, "_ADAPTER_BYTES is room for all"
        return slot

    def _batch(self, requests: Sequence[Request], slots_of: dict[Request, AdapterSlot]) -> Batch:
        """The step that computes everything of the requests that is not computed yet."""
        for request in requests:
            assert self._blocks.grow(request, request.num_tokens), "the pool is room for all"
        scheduled = [Scheduled(request, request.num_tokens - request.num_computed_tokens) for request in requests]
        return batches.build(scheduled, {request: (slots_of[request],) for request in requests}, _BLOCK_SIZE)


class _KeepingRunner(ModelRunner):
    """Keeps the logits of the last step, and how many rows it had."""

    logits: Tensor
    num_rows: int

    def forward(self, batch: Batch) -> Tensor:
        self.num_rows = len(batch.input_ids)
        self.logits = super().forward(batch)
        return self.logits


class PromptAgain:
    """An engine that is asked the same prompt of NUM_PROMPT tokens, and for one token, every time."""

    def __init__(self, base: Base, kernels: Kernels, config: EngineConfig) -> None:
        num_blocks = 1 + NUM_PROMPT // config.block_size
        self._runner = _KeepingRunner(
            base, num_kv_blocks=num_blocks, block_size=config.block_size, adapter_bytes=0, kernels=kernels
        )
        self._events: list[TokenEvent] = []
        self._engine = Engine(
            self._runner,
            config,
            num_kv_blocks=num_blocks,
            max_model_len=NUM_PROMPT + 1,
            callbacks=EngineCallbacks(events=self._events.extend, load=lambda generation: None),
            metrics=Metrics(),
        )
        self._prompt = tuple(prompts(1, NUM_PROMPT)[0])
        self._root = cache_root("", base.shape.digest, ())
        self._num_asked = 0
        self.ask()  # what may be kept of it is there from now on

    @property
    def num_rows(self) -> int:
        """Of the step that made the token."""
        return self._runner.num_rows

    def ask(self) -> Tensor:
        """Until the token is there; its logits [1, V]."""
        self._num_asked += 1
        self._engine.submit(
            Request(
                request_id=RequestId(str(self._num_asked)),
                prompt_token_ids=self._prompt,
                params=SamplingParams(temperature=0, max_new_tokens=1),
                cache_root=self._root,
                arrival_s=time.monotonic(),
            )
        )
        self._events.clear()
        while not self._events:
            self._engine.turn()
        (event,) = self._events
        if event.finish is None or event.finish.error is not None:
            raise RuntimeError(f"the prompt did not end in a token: {event}")
        return self._runner.logits


def _request(name: str, prompt: Sequence[int], adapter: int) -> Request:
    use = AdapterUse(Generation(str(adapter)), 1.0, 0)
    return Request(request_id=RequestId(name), prompt_token_ids=tuple(prompt), params=SamplingParams(), adapters=(use,))
