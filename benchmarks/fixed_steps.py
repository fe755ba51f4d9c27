"""Steps and prompts that repeat exactly, so that two ways of computing them can be compared.

A step writes keys and values where it wrote them before, and reads what it read before: it can be repeated any number
of times with the same logits.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.driven_engine import DrivenEngine
from benchmarks.models import prompts
from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot
from weft.config import EngineConfig
from weft.engine.batch import Stepper
from weft.engine.block_manager import BlockManager, cache_root
from weft.engine.request import AdapterUse, MixtureUse, Request, RequestId, SamplingParams
from weft.engine.runner import ModelRunner
from weft.engine.scheduler import Scheduled
from weft.kernels.selection import Kernels
from weft.kernels.step import Step
from weft.methods import mixture
from weft.methods.mixture import Expert, Mixture, MixtureConfig
from weft.methods.protocol import Adapter
from weft.model.loader import Base

NUM_ROWS = 16
NUM_CONTEXT = 64
NUM_PROMPT = 1024
RANK = 8
_BLOCK_SIZE = 16
_ADAPTER_BYTES = 1 << 28
_NUM_EXPERTS = 4


class Rows(NamedTuple):
    """Adapters of the rows, one for each, or mixtures, which in turn take as many of the adapters as they have experts.

    resident: adapters that are on the device but used by no row.
    """

    adapters: Sequence[Adapter]
    resident: Sequence[Adapter] = ()
    mixtures: Sequence[Mixture] = ()


def loras(base: Base) -> Rows:
    """Return LoRAs on every linear module, another for each row."""
    return Rows([models.made(models.lora_of(RANK), base.shape, seed) for seed in range(NUM_ROWS)])


def one_lora(base: Base) -> Rows:
    """Return the first of `loras` alone: one row, whose step is so short that every call shows."""
    return Rows([models.made(models.lora_of(RANK), base.shape, 0)])


def loras_at_q(base: Base) -> Rows:
    """Return LoRAs on q_proj alone, while adapters of every kind that act elsewhere are resident."""
    whole = loras(base).adapters
    kinds = models.IA3, models.PREFIX, models.BOTTLENECK
    return Rows(
        adapters=[_within(adapter, "q_proj") for adapter in whole],
        resident=[whole[0], *(models.made(kind, base.shape, 0) for kind in kinds)],
    )


def mixtures(base: Base) -> Rows:
    """Return mixtures of four LoRAs, two active at a time, another for each row."""
    config = MixtureConfig(num_experts=_NUM_EXPERTS, top_k=2)
    return Rows(
        adapters=[models.made(models.lora_of(RANK), base.shape, seed) for seed in range(NUM_ROWS * _NUM_EXPERTS)],
        mixtures=[
            Mixture(
                config,
                mixture.init(
                    config,
                    base.shape.num_layers,
                    base.shape.embedding_size,
                    torch.Generator().manual_seed(seed),
                ),
                tuple(Expert(f"{place:064x}") for place in range(_NUM_EXPERTS)),
            )
            for seed in range(NUM_ROWS)
        ],
    )


def _within(adapter: Adapter, suffix: str) -> Adapter:
    sites = {name: params for name, params in adapter.sites.items() if name.endswith(suffix)}
    return replace(adapter, config=replace(adapter.config, target_modules=(suffix,)), sites=sites)


class FixedSteps:
    """A decode step of rows with NUM_CONTEXT tokens before them, and a prompt of NUM_PROMPT with the first adapter."""

    def __init__(self, base: Base, kernels: Kernels, given: Rows) -> None:
        num_rows = len(given.mixtures or given.adapters)
        num_tokens = [*[NUM_CONTEXT + 1] * num_rows, NUM_PROMPT]
        num_blocks = sum(-(-count // _BLOCK_SIZE) for count in num_tokens)
        self._blocks = BlockManager(num_blocks, _BLOCK_SIZE, enable_prefix_caching=False)
        self._runner = ModelRunner(
            base,
            num_kv_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
            adapter_bytes=_ADAPTER_BYTES,
            kernels=kernels,
            num_captured_rows=num_rows,
        )
        self._stepper = Stepper(self._runner, _BLOCK_SIZE)
        self._runner.warm_up()
        built = (
            packed_adapter.build(adapter, base.shape, dtype=base.dtype)
            for adapter in (*given.adapters, *given.resident)
        )
        slots = [self._place(one) for one in built]
        routers = [self._place(packed_adapter.build_router(one)) for one in given.mixtures]
        per_row = len(given.adapters) // num_rows
        self._slots_of: dict[Request, tuple[AdapterSlot, ...]] = {}

        def request(name: str, prompt: Sequence[int], row: int) -> Request:
            first = row * per_row
            uses = [AdapterUse(AdapterDigest(f"{first + place:03}"), 1.0, 0) for place in range(per_row)]
            made = Request(
                request_id=RequestId(name),
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(),
                adapters=tuple(uses),
                mixture=MixtureUse(AdapterDigest(str(row))) if routers else None,
            )
            self._slots_of[made] = (*slots[first : first + per_row], *routers[row : row + 1])
            return made

        rows = [request(f"row {row}", prompt, row) for row, prompt in enumerate(prompts(num_rows, NUM_CONTEXT))]
        prompt = request("prompt", prompts(1, NUM_PROMPT)[0], 0)
        self._runner.forward(self._step(rows))
        for request in rows:
            request.num_computed_tokens = request.num_tokens
            request.output.append(1)
        self._decode, self._prompt = self._step(rows), self._step([prompt])
        self.decode()  # captures the step

    def decode(self) -> Tensor:
        """Compute the decode step; return its logits [rows, V], which are valid until the next step."""
        return self._runner.forward(self._decode)

    def prefill(self) -> Tensor:
        """Compute the prompt; return the logits of its last token [1, V]."""
        return self._runner.forward(self._prompt)

    def _place(self, laid_out: PackedAdapter) -> AdapterSlot:
        slot = self._runner.slots.put(laid_out)
        assert slot is not None, "_ADAPTER_BYTES is room for all"
        return slot

    def _step(self, requests: Sequence[Request]) -> Step:
        """Build the step that computes all tokens of the requests that are not computed yet."""
        for request in requests:
            assert self._blocks.grow(request, request.num_tokens), "the pool is room for all"
        scheduled = [Scheduled(request, request.num_tokens - request.num_computed_tokens) for request in requests]
        return self._stepper.build(scheduled, self._slots_of)


class _KeepingRunner(ModelRunner):
    """Keeps the logits of the last step, and its number of rows."""

    logits: Tensor
    num_rows: int

    def forward(self, step: Step) -> Tensor:
        self.num_rows = step.num_rows
        self.logits = super().forward(step)
        return self.logits


class PromptAgain:
    """An engine that gets the same prompt of NUM_PROMPT tokens every time, and generates one token."""

    def __init__(self, base: Base, kernels: Kernels, config: EngineConfig) -> None:
        num_blocks = 1 + NUM_PROMPT // config.block_size
        self._runner = _KeepingRunner(
            base, num_kv_blocks=num_blocks, block_size=config.block_size, adapter_bytes=0, kernels=kernels
        )
        self._engine = DrivenEngine(
            self._runner,
            config,
            num_kv_blocks=num_blocks,
            max_model_len=NUM_PROMPT + 1,
            packed_of={}.__getitem__,
        )
        self._prompt = tuple(prompts(1, NUM_PROMPT)[0])
        self._root = cache_root("", base.shape.digest, ())
        self._num_asked = 0
        self.ask()  # whatever may be cached from it is cached from now on

    @property
    def num_rows(self) -> int:
        """Rows of the step that generated the token."""
        return self._runner.num_rows

    def ask(self) -> Tensor:
        """Submit the prompt and run until the token is there; return its logits [1, V]."""
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
        while not self._engine.drive():
            pass
        return self._runner.logits
