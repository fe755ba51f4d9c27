"""A trace through transformers' `generate`: one batch after another, each running to its longest answer.

A batch holds what has arrived by the end of the one before. Prompts are padded on the left. A request that has all its
tokens cannot leave the batch before its end; its surplus tokens do not count.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.generation import BaseStreamer

from benchmarks import workload
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

PADDING = 0


class Stamps(BaseStreamer):
    """Times and ids of each step's tokens. The first call has the prompts, and is skipped."""

    def __init__(self) -> None:
        self.token_s: list[float] = []
        self.token_ids: list[torch.Tensor] = []  # [B] each
        self._has_prompts = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompts:
            self.token_s.append(time.monotonic())
            self.token_ids.append(value)
        self._has_prompts = True

    def end(self) -> None:
        pass


Take = Callable[[Sequence[workload.Request]], Sequence[workload.Request]]
"""Choose from the requests that have arrived those of the next batch, at least the first."""

Answer = Callable[[Sequence[workload.Request], dict[str, Any]], None]
"""Run `generate` with these keywords on a batch of these requests."""


def load(spec: LoadSpec) -> Any:
    """Load transformers' model in evaluation mode, with its own default attention."""
    torch.set_num_threads(spec.threads)
    quantized = None
    if spec.quantization == "nf4":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif spec.quantization != "none":
        raise Cannot(f"{spec.quantization} is not set up for it")
    model = AutoModelForCausalLM.from_pretrained(
        Path(spec.model), dtype=torch.bfloat16, quantization_config=quantized, local_files_only=True
    )
    return model.eval()


def run(trace: workload.Trace, take: Take, answer: Answer) -> Outcome:
    """Answer a trace in batches that `take` chooses from what has arrived."""
    if trace.registrations:
        raise Cannot("it cannot load adapters while it generates")
    started_s = time.monotonic()
    waiting = list(enumerate(trace.requests))
    records: dict[int, Record] = {}
    while waiting:
        time.sleep(max(0.0, started_s + waiting[0][1].arrival_s - time.monotonic()))
        elapsed_s = time.monotonic() - started_s
        arrived = {index: request for index, request in waiting if request.arrival_s <= elapsed_s}
        chosen = set(map(id, take(list(arrived.values()))))
        batch = {index: request for index, request in arrived.items() if id(request) in chosen}
        waiting = [(index, request) for index, request in waiting if index not in batch]
        records |= zip(batch, _answered(list(batch.values()), answer, started_s), strict=True)
    return Outcome(records=tuple(records[index] for index in range(len(trace.requests))))


@torch.inference_mode()
def _answered(batch: Sequence[workload.Request], answer: Answer, started_s: float) -> list[Record]:
    longest = max(len(request.prompt) for request in batch)
    num_new = max(request.num_new_tokens for request in batch)
    ids = torch.full((len(batch), longest), PADDING)  # [B, T]
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, longest - len(request.prompt) :] = 1
    stamps = Stamps()
    keywords = {
        "input_ids": ids,
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": num_new,
        "min_new_tokens": num_new,
        "pad_token_id": PADDING,
        "streamer": stamps,
    }
    answer(batch, keywords)
    tokens = torch.stack(stamps.token_ids).tolist()  # [num_new, B]
    return [
        Record(
            arrival_s=started_s + request.arrival_s,
            token_s=tuple(stamps.token_s[: request.num_new_tokens]),
            token_ids=tuple(step[row] for step in tokens[: request.num_new_tokens]),
        )
        for row, request in enumerate(batch)
    ]
