"""Compiles Triton kernels for an H100 or H200 on a machine that has none; what would be launched is compiled instead.

`python -m tests.kernels.compile_cuda` prints a line of JSON for each kernel: its name and the shared memory it takes.
Run it with TRITON_INTERPRET=0. The interpreter runs Python; whether a kernel is also Triton is seen only here.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from weft.kernels.cuda.attention import Attend
from weft.model.paged_attention import KVCache, PagedBatch


class Absent:
    """All that Triton's compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Callable[[], object]) -> list[Any]:
    """The kernels that `call` launches, none of which run."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return kernels


def attention(dtype: torch.dtype, *, lone: int, rows: int, head_size: int, spans: int, softcap: float) -> list[Any]:
    """Of a step with `lone` requests of one row, and one of `rows` where there are any."""
    counts = [1] * lone + [rows] * bool(rows)
    pool = torch.zeros(64, 16, 2, head_size, dtype=dtype)
    num_rows = sum(counts)
    batch = PagedBatch(
        cache=KVCache(keys=(pool,), values=(pool,)),
        kv_slots=torch.arange(num_rows),
        query_start=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(counts, dtype=torch.int32),
        virtual_lens=torch.zeros(len(counts), spans, dtype=torch.int32),
        block_tables=torch.zeros(len(counts), 64, dtype=torch.int32),
        log_gates=torch.zeros(num_rows, spans) if spans else None,
    )
    query, key = torch.zeros(num_rows, 8, head_size, dtype=dtype), torch.zeros(num_rows, 2, head_size, dtype=dtype)
    return compiled(lambda: Attend([pool], [pool])(batch, 0, query, key, key, 0.1, 0, softcap))


def main() -> None:
    triton.runtime.driver.set_active(Absent())
    kernels = [
        *attention(torch.bfloat16, lone=3, rows=0, head_size=128, spans=0, softcap=0.0),
        *attention(torch.bfloat16, lone=2, rows=9, head_size=80, spans=2, softcap=30.0),
        *attention(torch.float32, lone=2, rows=9, head_size=256, spans=0, softcap=0.0),
    ]
    for kernel in kernels:
        print(json.dumps({"name": kernel.metadata.name, "shared": kernel.metadata.shared}))


if __name__ == "__main__":
    main()
