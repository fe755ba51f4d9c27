"""transformers' continuous batching, the engine of `generate_batch`: paged attention, and no adapters.

The sizes of pool and step are set here, because by default it infers them from a GPU's memory. Attention is
`paged|sdpa`, its only kernel for a CPU. Blocks are not shared, so that no run reads the results of another.
"""

import time
from collections.abc import Mapping
from importlib.metadata import version

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from benchmarks import workload
from benchmarks.backends import static_batch, worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

_PAGE_SIZE = 32
_MAX_BATCH_TOKENS = 2048
_WAIT_S = 1.0


class TransformersPaged:
    """One manager for all runs; its thread waits between them."""

    def __init__(self) -> None:
        self._manager: ContinuousBatchingManager | None = None

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        if spec.adapters:
            raise Cannot("generate_batch takes no adapters")
        model = static_batch.load(spec)
        model.set_attn_implementation("paged|sdpa")
        pages = -(-spec.max_model_len // _PAGE_SIZE) + 1
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=static_batch.PADDING),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_SIZE,
                num_blocks=pages * spec.max_num_seqs,
                max_batch_tokens=_MAX_BATCH_TOKENS,
                max_requests_per_batch=spec.max_num_seqs,
                allow_block_sharing=False,
                use_cuda_graph=False,
            ),
        )
        self._manager.start()
        return {package: version(package) for package in ("transformers", "torch")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        if trace.registrations or any(request.adapters for request in trace.requests):
            raise Cannot("generate_batch takes no adapters")
        manager = self._manager
        assert manager is not None, "load comes first"
        started_s = time.monotonic()
        names = [f"{salt} {index}" for index in range(len(trace.requests))]
        for name, request in zip(names, trace.requests, strict=True):
            time.sleep(max(0.0, started_s + request.arrival_s - time.monotonic()))
            manager.add_request(
                list(request.prompt), name, request.num_new_tokens, record_timestamps=True, eos_token_id=-1
            )
        records = {}
        while len(records) < len(names):
            result = manager.get_result(timeout=_WAIT_S)
            if result is None and not manager.is_running():
                raise RuntimeError(f"its thread has ended: {manager.background_thread_status.fatal_error}")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                request = trace.requests[names.index(result.request_id)]
                records[result.request_id] = Record(
                    arrival_s=started_s + request.arrival_s,
                    token_s=tuple(result.timestamps or ()),
                    token_ids=tuple(result.generated_tokens),
                )
        return Outcome(records=tuple(records[name] for name in names))

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(hard_stop=True)


if __name__ == "__main__":
    worker.serve(TransformersPaged())
