"""The cost of each step of an engine, scheduler and sampler included, and the device's part of it."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.driven_engine import DrivenEngine
from benchmarks.gpu_base import Loras
from weft.adapters.identifiers import AdapterDigest
from weft.config import EngineConfig
from weft.engine.request import AdapterUse, FinishReason, Request, RequestId, RequestStatus, SamplingParams
from weft.engine.runner import ModelRunner
from weft.kernels import step as steps
from weft.kernels.selection import select
from weft.model.loader import Base

_BLOCK_SIZE = 16


class Step(NamedTuple):
    """One step of the engine. device_s: the part of `seconds` in which the device computed; 0 on a CPU."""

    seconds: float
    num_tokens: int
    device_s: float


class _TimedRunner(ModelRunner):
    """Records when the device begins and ends each step. Reading the records waits for the device, so do it later."""

    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]]

    def forward(self, step: steps.Step) -> torch.Tensor:
        if self._base.device.type != "cuda":
            return super().forward(step)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        logits = super().forward(step)
        end.record()
        self.spans.append((begin, end))
        return logits


class DecodeLoop:
    """An engine over a base and LoRAs; adapter -1 is the base alone.

    num_slots: number of adapters that the device has room for at once.
    """

    def __init__(
        self, base: Base, loras: Loras, *, max_num_seqs: int, num_slots: int, max_model_len: int, record: bool = True
    ) -> None:
        per_request = -(-max_model_len // _BLOCK_SIZE)
        num_kv_blocks = per_request * (max_num_seqs + 1)
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(2048, max_num_seqs),
            block_size=_BLOCK_SIZE,
            enable_prefix_caching=False,
        )
        self.runner = _TimedRunner(
            base,
            num_kv_blocks=num_kv_blocks,
            block_size=_BLOCK_SIZE,
            adapter_bytes=num_slots * loras.size_bytes,
            kernels=select(base.device, base.dtype),
            num_captured_rows=max_num_seqs if record else 0,
        )
        self.runner.spans = []
        self.requests: dict[RequestId, Request] = {}
        self.tokens_at: dict[RequestId, list[float]] = {}
        self._num_requests = 0
        self._engine = DrivenEngine(
            self.runner,
            config,
            num_kv_blocks=num_kv_blocks,
            max_model_len=max_model_len,
            packed_of=lambda digest: loras.packed(int(digest)),
        )

    def submit(self, adapter: int, prompt: Sequence[int], num_new_tokens: int) -> RequestId:
        """Queue a greedy request that ends after exactly `num_new_tokens`."""
        request_id = RequestId(str(self._num_requests))
        self._num_requests += 1
        uses = () if adapter < 0 else (AdapterUse(AdapterDigest(str(adapter)), 1.0, 0),)
        params = SamplingParams(temperature=0.0, max_new_tokens=num_new_tokens)
        request = Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=params, adapters=uses)
        self.requests[request_id], self.tokens_at[request_id] = request, []
        self._engine.submit(request)
        return request_id

    def step(self) -> Step:
        """Run one step."""
        begin = time.perf_counter()
        self._engine.drive()
        now, num_tokens = time.perf_counter(), 0
        for request_id, request in self.requests.items():
            at = self.tokens_at[request_id]
            new = len(request.output) - len(at)
            at += [now] * new
            num_tokens += new
        return Step(now - begin, num_tokens, 0.0)

    def run(self, *, until: Callable[[], bool]) -> list[Step]:
        """Run steps until a condition holds, and return them with their device times."""
        self.runner.spans = []
        steps: list[Step] = []
        while not until():
            steps.append(self.step())
        spans = self.runner.spans
        if len(spans) != len(steps):  # on a CPU, or if some steps had nothing to run
            return steps
        torch.cuda.synchronize()
        return [
            step._replace(device_s=begin.elapsed_time(end) / 1e3)
            for step, (begin, end) in zip(steps, spans, strict=True)
        ]

    def all_have(self, count: int) -> bool:
        """Return whether every request has `count` tokens, or has ended."""
        return all(
            len(self.tokens_at[name]) >= count or request.status is RequestStatus.FINISHED
            for name, request in self.requests.items()
        )

    def num_unfinished(self) -> int:
        """Count the requests that have not ended."""
        return sum(request.status is not RequestStatus.FINISHED for request in self.requests.values())

    def clear(self) -> None:
        """End every request; adapters stay."""
        for request_id in self.requests:
            self._engine.end(request_id, FinishReason.CANCELLED)
        self._engine.drive()
        self.requests.clear()
        self.tokens_at.clear()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()
