"""Compiles Triton kernels for an H100 or H200 on a machine without one; kernels are compiled instead of launched.

`python -m tests.kernels.compile_cuda` prints a line of JSON for each kernel: its name, its shared memory, and the
number of its loads of two bytes. Run it with TRITON_INTERPRET=0. The interpreter runs any Python; only this shows
whether a kernel is also valid Triton.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from tests.kernels.partial_steps import step_of
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from weft.adapters.slots import SlotTable
from weft.kernels.cuda import deltas, nf4, routing
from weft.kernels.cuda.attention import Attend
from weft.kernels.step import Entries, Paging, Routing
from weft.methods.protocol import DeltaKind


class Absent:
    """The part of a driver that Triton's compiler calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Callable[[], object]) -> list[Any]:
    """Return the kernels that `call` launches, without running them."""
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
    """Return the kernels of a step with `lone` requests of one row, and one of `rows` rows if there are any."""
    counts = [1] * lone + [rows] * bool(rows)
    pool = torch.zeros(64, 16, 2, head_size, dtype=dtype)
    num_rows = sum(counts)
    paging = Paging(
        kv_slots=torch.arange(num_rows),
        query_start=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(counts, dtype=torch.int32),
        virtual_lens=torch.zeros(len(counts), spans, dtype=torch.int32),
        block_tables=torch.zeros(len(counts), 64, dtype=torch.int32),
        log_gates=torch.zeros(num_rows, spans) if spans else None,
    )
    query, key = torch.zeros(num_rows, 8, head_size, dtype=dtype), torch.zeros(num_rows, 2, head_size, dtype=dtype)
    return compiled(lambda: Attend([pool], [pool])(paging, 0, query, key, key, 0.1, 0, softcap))


def site_deltas(dtype: torch.dtype, *, num_rows: int, size: int) -> list[Any]:
    """Return the kernels of every kind at once, and of a group of three sites."""
    site = deltas.Site(
        table=torch.zeros(1, 4, 4, dtype=torch.int64),
        size_in=size,
        sizes_out=(size,),
        weight_dtype=dtype,
        kinds=sum(1 << kind for kind in DeltaKind),
        rank=16,
    )
    kinds = 1 << DeltaKind.LORA | 1 << DeltaKind.SCALE_OUTPUT
    group = replace(site, table=site.table.repeat(3, 1, 1), sizes_out=(size, 1024, 1024), kinds=kinds)
    wide = torch.zeros(num_rows, group.size_out, dtype=dtype)
    slots, gates = torch.zeros(num_rows, dtype=torch.int32), torch.ones(num_rows)
    rows = deltas.rows_of(Entries(torch.arange(num_rows + 1, dtype=torch.int32), slots, gates))
    x, y = torch.zeros(num_rows, size, dtype=dtype), torch.zeros(num_rows, size, dtype=dtype)

    def call() -> None:
        deltas.pre(x, torch.empty_like(x), rows, site)
        deltas.post(x, y, rows, site, y)
        deltas.post(x, wide, rows, group)

    return compiled(call)


def nf4_product(*, num_rows: int, size_in: int, size_out: int) -> list[Any]:
    x, size = torch.zeros(num_rows, size_in, dtype=torch.bfloat16), size_in * size_out
    packed, scales = torch.zeros(size // 2, dtype=torch.uint8), torch.zeros(size // 64)
    return compiled(lambda: nf4.multiply(x, packed, scales, torch.zeros(16)))


def routers(dtype: torch.dtype, *, size: int, whole: bool, num_choices: int) -> list[Any]:
    offsets, slots = torch.arange(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    spans = torch.zeros(3, 2, dtype=torch.int32) if whole else None
    trace, log_gates = (torch.zeros(2, 9), torch.zeros(3, 2)) if whole else (None, None)
    routed = Routing((), torch.tensor([[0, 3, 0, 0, 0, 0]]), slots, spans, trace)
    step = step_of(Entries(offsets, slots, torch.ones(3)), routed, log_gates)
    table = SlotTable(num_sites=1, capacity_bytes=0, device=torch.device("cpu"))
    hidden = torch.zeros(3, size, dtype=dtype)
    return compiled(lambda: routing.Routers(table, step, num_choices).enter(1, hidden))


def main() -> None:
    triton.runtime.driver.set_active(Absent())
    kernels = [
        *attention(torch.bfloat16, lone=3, rows=0, head_size=128, spans=0, softcap=0.0),
        *attention(torch.bfloat16, lone=2, rows=9, head_size=80, spans=2, softcap=30.0),
        *attention(torch.float32, lone=2, rows=9, head_size=256, spans=0, softcap=0.0),
        *site_deltas(torch.bfloat16, num_rows=7, size=4096),
        *site_deltas(torch.bfloat16, num_rows=deltas.PER_ROW_MAX + 1, size=4096),
        *site_deltas(torch.float32, num_rows=deltas.PER_ROW_MAX + 1, size=14336),
        *nf4_product(num_rows=1, size_in=4096, size_out=4096),
        *nf4_product(num_rows=64, size_in=14336, size_out=4096),
        *routers(torch.bfloat16, size=4096, whole=True, num_choices=128),
        *routers(torch.float32, size=4096, whole=False, num_choices=512),
    ]
    odd = site_deltas(torch.bfloat16, num_rows=7, size=4095)  # with rows that begin anywhere
    for prefix, listed in (("", kernels), ("odd", odd)):
        for kernel in listed:
            name, narrow = prefix + kernel.metadata.name, kernel.asm["ptx"].count("ld.global.b16")
            print(json.dumps({"name": name, "shared": kernel.metadata.shared, "narrow": narrow}))


if __name__ == "__main__":
    main()
