"""Paged attention for CUDA against the reference, and the promise that a row's bits do not depend on its neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tests.kernels.interpreted import DEVICE
from torch import Tensor

from weft.kernels.cuda import attention, attention_plan
from weft.kernels.step import Paging
from weft.model.paged_attention import KVCache, ReferenceAttend

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and options of a layer and its calls."""

    dtype: torch.dtype = FLOAT32
    query_heads: int = 3
    kv_heads: int = 1
    head_size: int = 32
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.2
    block_size: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request with `num_queries` of its `num_real` tokens in this step; all its numbers are drawn from `seed`.

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
    """Arguments of a layer's attention. `pools` holds the contents from before the step."""

    shape: Shape
    paging: Paging
    pools: KVCache
    query: Tensor
    key: Tensor
    value: Tensor


def step(
    shape: Shape, requests: Sequence[Request], *, gated: bool = True, spare_columns: int = 0, spare_spans: int = 0
) -> Step:
    """Return a step over a pool with NaN in all unreadable places: holes, past each request's end, free blocks."""
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
        pools=KVCache(keys=(pools[0].to(DEVICE),), values=(pools[1].to(DEVICE),)),
        paging=Paging(
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
    shape, cache = given.shape, given.pools
    attend = attention.Attend(cache.keys, cache.values)
    return attend(given.paging, 0, given.query, given.key, given.value, shape.scale, shape.window, shape.softcap)


def reference(given: Step) -> Tensor:
    """Return the result in float32 from the same numbers, without reading holes and unseen blocks."""
    shape, cache = given.shape, given.pools
    attend = ReferenceAttend([cache.keys[0].float()], [cache.values[0].float()])
    paging = given.paging._replace(block_tables=given.paging.block_tables.clamp(min=0))
    return attend(
        paging, 0, given.query.float(), given.key.float(), given.value.float(), shape.scale, shape.window, shape.softcap
    )


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Check results within the rounding of float32 sums or, in 16 bits, of weights and the output to the dtype."""
    rtol, atol = {FLOAT32: (1e-5, 1e-5), BFLOAT16: (2**-7, 2**-7), FLOAT16: (2**-10, 2**-10)}[got.dtype]
    torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=atol)


def mixed(*spans: int) -> list[Request]:
    """Decode, whole prompts and chunks, on and beside boundaries of blocks, tiles and splits; spans for every other."""
    lengths = [(1, 1), (300, 1), (17, 17), (128, 1), (40, 0), (130, 66), (70, 3)]
    return [
        Request(num_real=real, num_queries=queries, spans=spans if seed % 2 else (), seed=seed)
        for seed, (real, queries) in enumerate(lengths)
    ]


def decoding(*spans: int) -> list[Request]:
    return [replace(request, num_queries=1) for request in mixed(*spans)[:4]]


@pytest.mark.parametrize("heads", [(8, 2, 64), (6, 2, 80), (4, 1, 128), (3, 3, 16)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_attend_is_the_reference(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    query_heads, kv_heads, head_size = heads
    shape = Shape(dtype=dtype, query_heads=query_heads, kv_heads=kv_heads, head_size=head_size, scale=head_size**-0.5)
    given = step(shape, mixed(3, 20))
    assert_near(run(given), reference(given))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
@pytest.mark.parametrize(("window", "softcap"), [(0, 3.0), (1, 0.0), (40, 0.0), (130, 3.0), (1000, 0.0)])
def test_windows_and_softcap(dtype: torch.dtype, window: int, softcap: float) -> None:
    shape = Shape(dtype=dtype, window=window, softcap=softcap)
    for requests in (mixed(9, 30), decoding(9, 30)):
        given = step(shape, requests)
        assert_near(run(given), reference(given))


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_block_sizes(block_size: int) -> None:
    given = step(Shape(block_size=block_size), mixed(3, 70))
    assert_near(run(given), reference(given))


@pytest.mark.parametrize("requests", [mixed(3, 70, 16), decoding(3, 70, 16)])
def test_gates_of_spans(requests: list[Request]) -> None:
    shape = Shape()
    given = step(shape, requests)
    out = run(given)
    assert_near(out, reference(given))
    # Negative controls: the gates of two spans swapped, and none at all.
    swapped = replace(given, paging=given.paging._replace(log_gates=given.paging.log_gates[:, [1, 0, 2]]))
    assert (out - reference(swapped)).abs().max() > 0.1
    none = step(shape, requests, gated=False)
    assert (out - reference(none)).abs().max() > 0.1
    assert_near(run(none), reference(none))


def test_a_gate_of_one_has_the_bits_of_no_gate() -> None:
    requests = [replace(r, log_gates=torch.zeros(1)) for r in mixed(9, 70)]
    for shape in (Shape(), Shape(dtype=BFLOAT16, window=100)):
        assert torch.equal(run(step(shape, requests)), run(step(shape, requests, gated=False)))


@pytest.mark.parametrize("num_queries", [1, 50])
@pytest.mark.parametrize("poison", [NAN, torch.inf])
def test_a_row_does_not_see_a_span_at_minus_infinity_whatever_it_holds(num_queries: int, poison: float) -> None:
    """Neighbouring rows in the same tile do see it."""
    closed = torch.arange(num_queries) % 3 != 1
    gates = torch.zeros(num_queries, 2).masked_fill_(closed[:, None] & torch.tensor([True, False]), -torch.inf)
    request = Request(num_real=90, num_queries=num_queries, spans=(70, 5), log_gates=gates)
    clean, poisoned = step(Shape(), [request]), step(Shape(), [request])
    first_span = poisoned.paging.block_tables[0, :5].long()
    for pool in (poisoned.pools.keys[0], poisoned.pools.values[0]):
        pool[first_span] = poison
    expected, out = run(clean), run(poisoned)
    assert_near(expected, reference(clean))
    assert torch.equal(out[closed], expected[closed])
    assert not out[~closed].isfinite().any()


def test_splits_are_joined_in_order_and_change_little() -> None:
    """For any content of a split: nothing, all, or the part that a window or the gates leave."""
    for shape in (Shape(), Shape(window=150)):
        given = step(shape, decoding(3, 140)[1:])
        run(given)  # stores
        cache, expected = given.pools, reference(given)
        whole = planned(given)
        assert whole.lone.num_splits > 3
        for split in (1024, 96):
            lone = whole.lone._replace(split=split, num_splits=-(-1024 // split))
            out = torch.full_like(given.query, NAN)
            attention.attend(
                given.query, cache.keys[0], cache.values[0], whole._replace(lone=lone), out,
                scale=shape.scale, window=shape.window,
            )  # fmt: skip
            assert_near(out, expected)


def planned(given: Step) -> attention_plan.Plan:
    shape = given.shape
    return attention_plan.plan(
        given.paging,
        num_rows=len(given.query), query_heads=shape.query_heads, kv_heads=shape.kv_heads,
        head_bytes=shape.head_size * given.query.element_size(), block_size=shape.block_size,
    )  # fmt: skip


def test_splits_follow_from_shapes() -> None:
    """A lone request gets small ones, a large batch large ones, and the number of programs is bounded."""
    assert attention_plan.split_of(8, 16) == 128
    assert attention_plan.split_of(8, 8192) == 128
    assert attention_plan.split_of(256, 8192) == 256
    assert attention_plan.split_of(2048, 8192) == 2048
    assert attention_plan.split_of(10**6, 8192) == 8192


@pytest.mark.parametrize("num_rows", [0, 3, 40, 400])
def test_every_row_of_a_request_is_in_one_tile(num_rows: int) -> None:
    """Even if no request has rows past a point, as in a graph whose batch is not full."""
    starts = {0: [0, 0, 0], 3: [0, 1, 1, 3], 40: [0, 1, 38, 38, 39, 40], 400: [0, 1, 2, 150, 152, 400]}[num_rows]
    query_start = torch.tensor(starts, dtype=torch.int32)
    num_requests = len(starts) - 1
    lengths = torch.ones(num_requests, dtype=torch.int32)
    for rows in (num_rows, num_rows + 5):
        plan = attention_plan.plan(
            Paging(torch.empty(0), query_start, lengths, torch.zeros(num_requests, 0), torch.zeros(num_requests, 4)),
            num_rows=rows, query_heads=12, kv_heads=2, head_bytes=128, block_size=16,
        )  # fmt: skip
        covered = torch.zeros(rows, dtype=torch.int32)
        for tiles in (plan.lone, plan.shared):
            if tiles is None:
                continue
            for first, request in zip(tiles.first_rows.tolist(), tiles.requests.tolist(), strict=True):
                if request < num_requests:
                    assert starts[request] <= first < starts[request + 1]
                    covered[first : min(first + tiles.num_queries, starts[request + 1])] += 1
        assert covered.tolist() == [1] * num_rows + [0] * (rows - num_rows)


def test_rows_of_nobody_are_left_alone() -> None:
    given = step(Shape(), decoding())
    more = torch.cat([given.query, given.query[:2]])
    out = torch.full_like(more, 7.0)
    run(given)
    plan = planned(replace(given, query=more))
    attention.attend(more, given.pools.keys[0], given.pools.values[0], plan, out, scale=0.2)
    assert_near(out[:-2], reference(given))
    assert out[-2:].eq(7.0).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("requests", [mixed(3, 20), decoding(3, 20)])
def test_a_rows_bits_do_not_depend_on_its_neighbours(dtype: torch.dtype, requests: list[Request]) -> None:
    """All other requests get other tokens, lengths, spans and gates; the step's shape stays."""
    shape = Shape(dtype=dtype, window=90)
    before = run(step(shape, requests)).split([r.num_queries for r in requests])
    for kept in (1, 2, len(requests) - 1):
        others = [
            r if n == kept else replace(r, seed=r.seed + 50, num_real=max(r.num_queries, r.num_real - 11))
            for n, r in enumerate(requests)
        ]
        longest = max(range(len(requests)), key=lambda n: requests[n].num_real)
        others[longest] = replace(others[longest], num_real=requests[longest].num_real)  # the table stays as wide
        after = run(step(shape, others)).split([r.num_queries for r in requests])
        assert torch.equal(after[kept], before[kept])
        assert not torch.equal(after[0], before[0])


def test_the_bit_detector_detects() -> None:
    """A tiny change of one visible key changes the rows that see the key, and no others."""
    request = Request(num_real=40, num_queries=40)
    before, given = run(step(Shape(), [request])), step(Shape(), [request])
    given.key[30] *= 1.0001
    after = run(given)
    assert torch.equal(before[:30], after[:30])
    assert (before != after).flatten(1).any(1)[30:].all()


def test_each_pass_through_the_layers_reads_the_batch_anew() -> None:
    """A graph's paging is one object: its tensors change between steps, and gates even between layers."""
    shape = Shape()
    one, two = step(shape, decoding(3, 20)), step(shape, [replace(r, seed=r.seed + 7) for r in decoding(3, 20)])
    cache = KVCache(keys=one.pools.keys * 2, values=one.pools.values * 2)  # two layers hold the same
    attend, paging = attention.Attend(cache.keys, cache.values), one.paging

    def layers(given: Step) -> list[Tensor]:
        return [attend(paging, n, given.query, given.key, given.value, shape.scale, 0, 0.0) for n in (0, 1)]

    for out in layers(one):
        assert torch.equal(out, run(one))
    for name in ("kv_slots", "query_start", "context_lens", "virtual_lens", "block_tables", "log_gates"):
        getattr(paging, name).copy_(getattr(two.paging, name))
    cache.keys[0].copy_(two.pools.keys[0])
    cache.values[0].copy_(two.pools.values[0])
    for out in layers(two):
        assert torch.equal(out, run(two))
    paging.log_gates[:, 0] = -torch.inf
    assert not torch.equal(attend(paging, 1, two.query, two.key, two.value, shape.scale, 0, 0.0), out)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_heads_may_be_strided(dtype: torch.dtype) -> None:
    """As models pass them: [Hq, T, D] viewed as [T, Hq, D]."""
    given = step(Shape(dtype=dtype), mixed())
    expected = run(given)

    def strided(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., :32]

    assert not strided(given.key).is_contiguous()
    pools = given.pools
    for pool in (pools.keys[0], pools.values[0]):
        pool.flatten(0, 1)[given.paging.kv_slots] = NAN
    heads = {name: strided(getattr(given, name)) for name in ("query", "key", "value")}
    assert torch.equal(run(replace(given, **heads)), expected)
    assert torch.equal(pools.keys[0].flatten(0, 1)[given.paging.kv_slots], given.key)
    assert torch.equal(pools.values[0].flatten(0, 1)[given.paging.kv_slots], given.value)


def test_an_empty_step() -> None:
    given = step(Shape(), [Request(num_real=5, num_queries=0)])
    assert run(given).shape == (0, 3, 32)


def test_misuse_is_named() -> None:
    given = step(Shape(query_heads=6, kv_heads=2), decoding())
    pool = given.pools.keys[0]
    bad_calls = [
        ("keys: needs contiguous", lambda: attention.Attend([pool[:, ::2]], [pool])),
        ("values: needs contiguous", lambda: attention.Attend([pool], [pool.double()])),
        ("keys: needs D up to 256", lambda: attention.Attend([torch.zeros(1, 1, 1, 264)], [pool])),
        ("query: needs torch.float32", lambda: run(replace(given, query=given.query.half()))),
        ("query: needs a multiple of the 2 KV heads", lambda: run(replace(given, query=given.query[:, :5]))),
        ("key: needs torch.float32 with a contiguous", lambda: run(replace(given, key=given.key[..., ::2]))),
        ("value: needs torch.float32 with a contiguous", lambda: run(replace(given, value=given.value[..., :16]))),
    ]
    for text, call in bad_calls:
        with pytest.raises(ValueError, match=text):
            call()
