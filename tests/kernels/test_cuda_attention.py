"""Paged attention for CUDA against the reference, and the promise that a row's bits do not depend on its neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE
from weft.kernels.cuda import attention
from weft.model.paged_attention import KVCache, PagedBatch, attend_reference

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a layer and its calls."""

    dtype: torch.dtype = FLOAT32
    query_heads: int = 6
    kv_heads: int = 2
    head_size: int = 32
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.2
    block_size: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that has `num_queries` of its `num_real` tokens in this step; all of its numbers come of `seed`.

    log_gates: by span, one for all rows or one for each; None leaves every fifth row's at -inf.
    """

    num_real: int
    num_queries: int
    spans: tuple[int, ...] = ()
    log_gates: Tensor | None = None
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        return [*self.spans, self.num_real]

    def normal(self, shape: Shape, what: int, length: int, heads: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + what)
        return torch.randn(length, heads, shape.head_size, generator=generator).to(shape.dtype)

    def gates(self) -> Tensor:
        """[num_queries, spans]."""
        if self.log_gates is not None:
            return self.log_gates.expand(self.num_queries, len(self.spans))
        gates = torch.randn(self.num_real, len(self.spans), generator=torch.Generator().manual_seed(self.seed)) * 2
        gates.flatten()[3::5] = -torch.inf
        return gates[self.num_real - self.num_queries :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a layer's attention is called with. `pools` holds what was there before the step."""

    shape: Shape
    batch: PagedBatch
    query: Tensor
    key: Tensor
    value: Tensor


def step(
    shape: Shape, requests: Sequence[Request], *, gated: bool = True, spare_columns: int = 0, spare_spans: int = 0
) -> Step:
    """A step over a pool with NaN wherever nobody may read: holes, past each request's end, blocks that nobody has."""
    size, num_spans = shape.block_size, max(len(r.spans) for r in requests) + spare_spans
    counts = [sum(-(-length // size) for length in r.lengths) for r in requests]
    place = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(len(requests)))
    pools = torch.full((2, len(place), size, shape.kv_heads, shape.head_size), NAN, dtype=shape.dtype)
    tables = torch.full((len(requests), max(counts) + spare_columns), -(10**6), dtype=torch.int32)
    virtual_lens = torch.zeros(len(requests), num_spans, dtype=torch.int32)
    log_gates = torch.full((sum(r.num_queries for r in requests), num_spans), NAN)
    slots, new, row = [], [], 0
    for b, (r, count) in enumerate(zip(requests, counts, strict=True)):
        tables[b, :count], place = place[:count], place[count:]
        virtual_lens[b, : len(r.spans)] = torch.tensor(r.spans)
        log_gates[row : row + r.num_queries, : len(r.spans)] = r.gates()
        row += r.num_queries
        logical = (tables[b, :count, None].long() * size + torch.arange(size)).flatten()
        begin = 0
        for s, length in enumerate(r.lengths):
            here, begin = logical[begin : begin + length], begin - (-length // size) * size
            for pool, what in zip(pools, (2 * s, 2 * s + 1), strict=True):
                pool.flatten(0, 1)[here] = r.normal(shape, what, length, shape.kv_heads)
        slots.append(here[r.num_real - r.num_queries :])
        new.append(pools.flatten(1, 2)[:, slots[-1]])
        pools.flatten(1, 2)[:, slots[-1]] = NAN  # the step stores these
    keys, values = torch.cat(new, 1)
    query = [r.normal(shape, 99, r.num_real, shape.query_heads)[r.num_real - r.num_queries :] for r in requests]
    return Step(
        shape=shape,
        batch=PagedBatch(
            cache=KVCache(keys=(pools[0].to(DEVICE),), values=(pools[1].to(DEVICE),)),
            kv_slots=torch.cat(slots).to(DEVICE),
            query_start=torch.tensor([0, *(r.num_queries for r in requests)]).cumsum(0).int().to(DEVICE),
            context_lens=torch.tensor([r.num_real for r in requests], dtype=torch.int32).to(DEVICE),
            virtual_lens=virtual_lens.to(DEVICE),
            block_tables=tables.to(DEVICE),
            log_gates=log_gates.to(DEVICE) if gated else None,
        ),
        query=torch.cat(query).to(DEVICE),
        key=keys.to(DEVICE),
        value=values.to(DEVICE),
    )


def run(given: Step) -> Tensor:
    shape, cache = given.shape, given.batch.cache
    attend = attention.Attend(cache.keys, cache.values)
    return attend(
        given.batch, 0, given.query, given.key, given.value, shape.scale, shape.window, shape.softcap
    )


def reference(given: Step) -> Tensor:
    """float32 over the same numbers, whose holes and unseen blocks nothing reads."""
    shape, cache = given.shape, given.batch.cache
    wide = KVCache(keys=(cache.keys[0].float(),), values=(cache.values[0].float(),))
    batch = replace(given.batch, cache=wide, block_tables=given.batch.block_tables.clamp(min=0))
    return attend_reference(
        batch, 0, given.query.float(), given.key.float(), given.value.float(), shape.scale, shape.window, shape.softcap
    )


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within the rounding of float32 sums; below it, of weights and of the output to the dtype."""
    rtol, atol = {FLOAT32: (1e-5, 1e-5), BFLOAT16: (2**-7, 2**-8), FLOAT16: (2**-9, 2**-10)}[got.dtype]
    torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=atol)


def test_first() -> None:
    shape = Shape()
    given = step(shape, [Request(num_real=20, num_queries=1, seed=1), Request(num_real=300, num_queries=1, spans=(3, 20), seed=2), Request(num_real=150, num_queries=70, spans=(3, 20), seed=3)])
    assert_near(run(given), reference(given))
    given = step(shape, [Request(num_real=20, num_queries=1, seed=1), Request(num_real=300, num_queries=1, spans=(3, 20), seed=2)])
    assert_near(run(given), reference(given))
