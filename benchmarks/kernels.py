"""The CPU kernels beside torch's alternatives for the same work: microseconds, medians of interleaved calls.

    python benchmarks/kernels.py [--threads N] [--rounds N]

Torch's alternatives get their inputs in their fastest layout (contiguous slots, contiguous unpaged keys with the query
heads of a group as rows), which a server would first have to make.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from weft.kernels.cpu import attention, deltas, gemm, library
from weft.kernels.step import Entries, Paging
from weft.methods import bottleneck
from weft.methods.protocol import DeltaKind, Site
from weft.model.packed import multiplies_bfloat16

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
_PAST_CACHES = 64 << 20  # bytes
Calls = dict[str, Callable[[], object]]


class Case(NamedTuple):
    name: str
    calls: Calls  # the first is the kernel, if this machine has it


def post(
    num_rows: int, num_slots: int, rank: int, size_in: int, size_out: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Return one call of `deltas.post` with rows and weights in `dtype`, every row with one adapter."""
    a, b = torch.randn(num_slots, rank, size_in).to(dtype), torch.randn(num_slots, rank, size_out).to(dtype)
    table = torch.tensor([(int(DeltaKind.LORA), rank, a[s].data_ptr(), b[s].data_ptr()) for s in range(num_slots)])
    site = deltas.Site(table=table, size_in=size_in, size_out=size_out, weight_dtype=dtype)
    slots = (torch.arange(num_rows) * num_slots // num_rows).to(torch.int32)
    rows = deltas.pack(Entries(torch.arange(num_rows + 1, dtype=torch.int32), slots, torch.ones(num_rows)))
    x, y = torch.randn(num_rows, size_in).to(dtype), torch.zeros(num_rows, size_out).to(dtype)

    def call(_weights: tuple[torch.Tensor, torch.Tensor] = (a, b)) -> None:
        deltas.post(x, y, rows, site)

    return call


def decode_deltas(num_slots: int, rank: int, size_in: int, size_out: int) -> Case:
    """Return a case with one row for each slot."""
    x = torch.randn(num_slots, 1, size_in)
    a, b = torch.randn(num_slots, size_in, rank), torch.randn(num_slots, rank, size_out)
    base_x, base = x[:, 0].bfloat16(), torch.randn(size_out, size_in).bfloat16()
    chosen = torch.randperm(num_slots)

    def loop() -> None:
        for s in range(num_slots):
            torch.mm(torch.mm(x[s], a[s]), b[s])

    return Case(
        f"deltas, {num_slots} slots of one row, r {rank}, {size_in}→{size_out}",
        {
            "kernel bf16": post(num_slots, num_slots, rank, size_in, size_out, BFLOAT16),
            "kernel fp32": post(num_slots, num_slots, rank, size_in, size_out, FLOAT32),
            "2 bmm fp32": lambda: torch.bmm(torch.bmm(x, a), b),
            "gather + 2 bmm": lambda: torch.bmm(torch.bmm(x, a[chosen]), b[chosen]),
            "loop": loop,
            "base GEMM bf16": lambda: F.linear(base_x, base),
        },
    )


def prefill_deltas(num_rows: int, rank: int, size_in: int, size_out: int) -> Case:
    """Return a case with all rows in one slot."""
    x, base = torch.randn(num_rows, size_in).bfloat16(), torch.randn(size_out, size_in).bfloat16()
    a, b = torch.randn(rank, size_in).bfloat16(), torch.randn(size_out, rank).bfloat16()
    y = torch.zeros(num_rows, size_out).bfloat16()
    return Case(
        f"deltas, {num_rows} rows of one slot, r {rank}, {size_in}→{size_out}",
        {
            "kernel bf16": post(num_rows, 1, rank, size_in, size_out, BFLOAT16),
            "kernel fp32": post(num_rows, 1, rank, size_in, size_out, FLOAT32),
            "2 linear + add bf16": lambda: y.add_(F.linear(F.linear(x, a), b)),
            "base GEMM bf16": lambda: F.linear(x, base),
        },
    )


def decode_bottlenecks(num_slots: int, size: int, features: int) -> Case:
    """Return a case with one row for each of `num_slots` bottleneck adapters."""
    config = bottleneck.math.BottleneckConfig(size=size, has_norm=False)
    site = Site(0, "down_proj", features, features, sublayer="mlp", layer=0)
    networks = [bottleneck.math.init(config, site)._replace(up=torch.randn(features, size)) for _ in range(num_slots)]
    packed = [bottleneck.math.pack(network, BFLOAT16)[0] for network in networks]
    table = torch.tensor(
        [[p.kind, p.rank, p.first.data_ptr(), p.second.data_ptr()] for p in packed if p.second is not None]
    )
    slots = torch.arange(num_slots, dtype=torch.int32)
    rows = deltas.pack(Entries(torch.arange(num_slots + 1, dtype=torch.int32), slots, torch.ones(num_slots)))
    place = deltas.Site(table=table, size_in=features, size_out=features, weight_dtype=BFLOAT16)
    x, y = torch.randn(2, num_slots, features).bfloat16()
    base = torch.randn(features, features).bfloat16()

    def kernel() -> None:
        assert len(packed) == num_slots  # keeps the weights alive that the table points at
        deltas.post(x, y, rows, place)

    def loop() -> None:
        for row, network in enumerate(networks):
            bottleneck.math.delta(network, y[row], None)

    return Case(
        f"bottlenecks, {num_slots} slots of one row, size {size}, {features}",
        {"kernel bf16": kernel, "loop fp32": loop, "base GEMM bf16": lambda: F.linear(x, base)},
    )


def attend(
    num_requests: int, num_queries: int, context: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> Callable[[], None]:
    """Return one call of `attention.attend`, with blocks of 16 in random order."""
    query_heads, kv_heads, head_size = heads
    blocks = -(-context // 16)
    shape = (num_requests * blocks, 16, kv_heads, head_size)
    cache = attention.Cache(keys=torch.randn(shape).to(dtype), values=torch.randn(shape).to(dtype))
    packed = attention.pack(
        Paging(
            torch.empty(0),  # all keys and values are stored already
            torch.arange(num_requests + 1, dtype=torch.int32) * num_queries,
            torch.full((num_requests,), context, dtype=torch.int32),
            torch.zeros(num_requests, 0, dtype=torch.int32),
            torch.randperm(num_requests * blocks).view(num_requests, blocks).to(torch.int32),
        )
    )
    query = torch.randn(num_requests * num_queries, query_heads, head_size).to(dtype)
    out = torch.empty_like(query)
    return lambda: attention.attend(query, cache, packed, out, scale=head_size**-0.5)


def decode_attention(context: int, dtype: torch.dtype) -> Case:
    """Return a case of sixteen requests with one query each."""
    heads = query_heads, kv_heads, head_size = 12, 4, 64
    group = query_heads // kv_heads
    query = torch.randn(16 * kv_heads, group, head_size).to(dtype)
    keys = torch.randn(16 * kv_heads, head_size, context).to(dtype)
    values = torch.randn(16 * kv_heads, context, head_size).to(dtype)
    as_rows = query.view(16, kv_heads, group, head_size)
    slabs = keys.mT.contiguous().view(16, kv_heads, context, head_size), values.view(16, kv_heads, context, head_size)
    return Case(
        f"attention, 16 queries, context {context}, {str(dtype)[6:]}",
        {
            "kernel": attend(16, 1, context, heads, dtype),
            "matmul-softmax-matmul": lambda: torch.matmul(torch.matmul(query, keys).mul(0.125).softmax(-1), values),
            "SDPA, group as rows": lambda: F.scaled_dot_product_attention(as_rows, *slabs),
        },
    )


def prefill_attention(num_queries: int, context: int, dtype: torch.dtype) -> Case:
    """Return a case of one request."""
    heads = query_heads, _, head_size = 12, 4, 64
    query = torch.randn(1, query_heads, num_queries, head_size).to(dtype)
    keys, values = torch.randn(2, 1, query_heads, context, head_size).to(dtype)
    mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    options = {"is_causal": True} if num_queries == context else {"attn_mask": mask}
    return Case(
        f"attention, {num_queries} queries, context {context}, {str(dtype)[6:]}",
        {
            "kernel": attend(1, num_queries, context, heads, dtype),
            "SDPA": lambda: F.scaled_dot_product_attention(query, keys, values, **options),  # type: ignore[arg-type]
        },
    )


def product(num_rows: int, size_in: int, size_out: int) -> Case:
    """Return the product of a linear module; each call uses another copy of the weight, from memory as in a step."""
    weight, x = torch.randn(size_out, size_in).bfloat16(), torch.randn(num_rows, size_in).bfloat16()
    num_copies = 1 + _PAST_CACHES // (2 * weight.numel())
    plain = itertools.cycle([weight.clone() for _ in range(num_copies)])
    calls: Calls = {}
    if gemm.available():
        own = itertools.cycle([gemm.pack(weight) for _ in range(num_copies)])
        calls["kernel"] = lambda: gemm.linear(x, next(own))
    if multiplies_bfloat16():
        ops = torch.ops.mkldnn
        reordered = itertools.cycle([ops._reorder_linear_weight(weight, 16) for _ in range(num_copies)])
        calls["oneDNN, packed"] = lambda: ops._linear_pointwise(x, next(reordered), None, "none", [], "")
    calls["F.linear"] = lambda: F.linear(x, next(plain))
    return Case(f"product, {num_rows} rows, {size_in}→{size_out}", calls)


def medians_us(calls: Calls, rounds: int) -> dict[str, float]:
    """Time interleaved calls, so that other load falls on all alike; each call follows one of its own kind."""
    taken_s: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            call()
            taken_s[name].append(time.perf_counter() - begin)
    return {name: statistics.median(samples) * 1e6 for name, samples in taken_s.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library.functions()
    cases = [
        decode_deltas(16, 8, 768, 768),
        decode_deltas(32, 16, 2048, 8192),
        prefill_deltas(512, 16, 768, 2048),
        decode_bottlenecks(16, 48, 768),
        *(decode_attention(context, BFLOAT16) for context in (100, 500, 2000)),
        *(decode_attention(context, FLOAT32) for context in (100, 500)),
        *(prefill_attention(512, context, BFLOAT16) for context in (512, 2048)),
        *(prefill_attention(512, context, FLOAT32) for context in (512, 2048)),
    ]
    products = [
        *(product(num_rows, 768, 4096) for num_rows in (1, 4, 8, 16, 32, 64, 512)),
        *(product(16, *sizes) for sizes in ((768, 768), (768, 1280), (2048, 768), (768, 8192), (8192, 2048))),
    ]
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, medians of {options.rounds}\n")
    print("| case | implementation | µs | of the kernel |\n|---|---|---:|---:|")
    with torch.inference_mode():
        for case in (*cases, *products):
            took = medians_us(case.calls, options.rounds)
            kernel_us = next(iter(took.values()))
            for name, us in took.items():
                print(f"| {case.name} | {name} | {us:,.0f} | {us / kernel_us:.2f} |", flush=True)


if __name__ == "__main__":
    main()
