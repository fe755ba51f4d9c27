"""Paged attention on the CPU against float64, and the promise that a row's bits are its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from weft.kernels.cpu import attention, library
from weft.kernels.step import Paging

pytestmark = pytest.mark.skipif(not library.available(), reason=library.load().reason or "the kernels are there")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A whole sequence: keys and values [positions, Hkv, D], virtual ones by span, and queries [real, Hq, D]."""

    virtual_keys: list[Tensor]
    virtual_values: list[Tensor]
    log_gates: Tensor  # [real, spans]
    keys: Tensor
    values: Tensor
    queries: Tensor
    num_queries: int  # in this step: the last ones

    @property
    def spans(self) -> list[int]:
        return [len(keys) for keys in self.virtual_keys]

    @property
    def num_real(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and options of a layer and its calls."""

    dtype: torch.dtype = FLOAT32
    query_heads: int = 6
    kv_heads: int = 2
    head_size: int = 32
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.2

    def request(self, num_real: int, num_queries: int, *spans: int, gated: bool = False) -> Request:
        """gated: a log-gate for each query and span, every fifth -inf; otherwise all are 0."""

        def made(length: int, heads: int) -> Tensor:
            return torch.randn(length, heads, self.head_size).to(self.dtype)

        return Request(
            virtual_keys=[made(length, self.kv_heads) for length in spans],
            virtual_values=[made(length, self.kv_heads) for length in spans],
            log_gates=random_gates(num_real, len(spans)) if gated else torch.zeros(num_real, len(spans)),
            keys=made(num_real, self.kv_heads),
            values=made(num_real, self.kv_heads),
            queries=made(num_real, self.query_heads),
            num_queries=num_queries,
        )


def random_gates(num_rows: int, num_spans: int) -> Tensor:
    gates = torch.randn(num_rows, num_spans) * 2
    gates.flatten()[3::5] = -torch.inf
    return gates


def run(
    shape: Shape,
    requests: Sequence[Request],
    *,
    block_size: int = 16,
    spare_columns: int = 0,
    spare_spans: int = 0,
    says_gates: bool | None = None,
) -> Tensor:
    """One step over a cache that holds NaN everywhere else, blocks in random order, garbage past each table's end.

    says_gates: whether log-gates are given; None gives them where they are not all 0. Those of spans that a request
    does not have are NaN.
    """
    num_spans = max((len(r.spans) for r in requests), default=0) + spare_spans
    virtual_lens = torch.zeros(len(requests), num_spans, dtype=torch.int32)
    log_gates = torch.full((sum(r.num_queries for r in requests), num_spans), NAN)
    tables, blocks_before = [], 0
    for b, (r, gates) in enumerate(zip(requests, log_gates.split([r.num_queries for r in requests]), strict=True)):
        virtual_lens[b, : len(r.spans)] = torch.tensor(r.spans)
        gates[:, : len(r.spans)] = r.log_gates[r.num_real - r.num_queries :]
        count = sum(-(-length // block_size) for length in [*r.spans, r.num_real])
        tables.append(torch.arange(blocks_before, blocks_before + count))
        blocks_before += count
    num_blocks = blocks_before + 3
    place = torch.randperm(num_blocks)
    pool = torch.full((num_blocks, block_size, shape.kv_heads, shape.head_size), NAN, dtype=shape.dtype)
    cache = attention.Cache(keys=pool, values=pool.clone())
    block_tables = torch.full((len(requests), max(map(len, tables), default=0) + spare_columns), -99, dtype=torch.int32)
    for b, (r, table) in enumerate(zip(requests, tables, strict=True)):
        table = place[table]
        block_tables[b, : len(table)] = table
        slots = (table[:, None] * block_size + torch.arange(block_size)).flatten()
        begin = 0
        for keys, values in zip([*r.virtual_keys, r.keys], [*r.virtual_values, r.values], strict=True):
            attention.store(keys, values, cache, slots[begin : begin + len(keys)].contiguous())
            begin += -(-len(keys) // block_size) * block_size
    if says_gates is None:
        says_gates = any(r.log_gates.any() for r in requests)
    query = torch.cat([r.queries[r.num_real - r.num_queries :] for r in requests])
    out = torch.full_like(query, NAN)
    attention.attend(
        query,
        cache,
        packed(
            query_start=torch.tensor([0, *(r.num_queries for r in requests)]).cumsum(0).int(),
            context_lens=torch.tensor([r.num_real for r in requests], dtype=torch.int32),
            virtual_lens=virtual_lens,
            block_tables=block_tables,
            log_gates=log_gates if says_gates else None,
        ),
        out,
        scale=shape.scale,
        window=shape.window,
        softcap=shape.softcap,
    )
    return out


def reference(shape: Shape, requests: Sequence[Request]) -> Tensor:
    """Return the textbook's result in float64."""
    outs = []
    for r in requests:
        group = shape.query_heads // shape.kv_heads
        keys = torch.cat([*r.virtual_keys, r.keys]).double().repeat_interleave(group, 1)
        values = torch.cat([*r.virtual_values, r.values]).double().repeat_interleave(group, 1)
        gates = r.log_gates[r.num_real - r.num_queries :].double().repeat_interleave(torch.tensor(r.spans).long(), 1)
        queries = r.queries[r.num_real - r.num_queries :].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * shape.scale
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        scores[:, :, : gates.shape[1]] += gates
        key_at = torch.arange(len(keys))
        query_at = key_at[len(key_at) - r.num_queries :]
        distance = query_at[:, None] - key_at
        hidden = (distance < 0) | (distance >= shape.window if shape.window else torch.tensor(False))
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outs)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Check that results are within float32's rounding of such sums, and one rounding to the output's dtype."""
    rounding = {FLOAT32: 1e-6, BFLOAT16: 2**-8}[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=3e-6)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    as_int = torch.int32 if a.dtype is FLOAT32 else torch.int16
    return torch.equal(a.view(as_int), b.view(as_int))


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[Callable[[int], None]]:
    """Use one thread, unless a test sets more: on a busy machine two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mixed(shape: Shape) -> list[Request]:
    """Decode, whole prompts and chunks; with and without virtual positions; on and beside boundaries of 16 and 64."""
    lengths = [(1, 1, 0), (16, 1, 0), (17, 17, 1), (64, 64, 16), (65, 1, 17), (130, 66, 0), (200, 3, 70), (63, 0, 0)]
    return [shape.request(*length) for length in lengths]


def gated(shape: Shape) -> list[Request]:
    """The same with up to four spans of any length, each with a log-gate per query."""
    lengths = [(1, 1, 3, 5), (16, 1), (17, 17, 1, 16, 2), (64, 64, 65, 17), (65, 1, 0, 30, 16, 7), (130, 66, 4)]
    return [shape.request(*length, gated=True) for length in [*lengths, (200, 3, 70, 130), (63, 0, 9, 9)]]


@pytest.mark.parametrize(
    "heads", [(12, 4, 64), (6, 2, 32), (1, 1, 16), (5, 1, 80), (4, 4, 8), (9, 1, 128), (2, 1, 256)]
)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_attend_is_the_textbook(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    query_heads, kv_heads, head_size = heads
    shape = Shape(dtype=dtype, query_heads=query_heads, kv_heads=kv_heads, head_size=head_size, scale=head_size**-0.5)
    requests = mixed(shape)
    assert_near(run(shape, requests), reference(shape, requests))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_windows_and_softcap(dtype: torch.dtype, window: int, softcap: float) -> None:
    shape = Shape(dtype=dtype, window=window, softcap=softcap)
    requests = mixed(shape)
    assert_near(run(shape, requests), reference(shape, requests))


@pytest.mark.parametrize("block_size", [1, 5, 64, 256])
def test_block_sizes(block_size: int) -> None:
    shape = Shape()
    requests = mixed(shape)
    out = run(shape, requests, block_size=block_size)
    assert_near(out, reference(shape, requests))
    assert equal_bits(out, run(shape, requests))


def test_spans_keep_to_their_blocks() -> None:
    shape = Shape()
    requests = gated(shape)
    out = run(shape, requests)
    for block_size in (1, 5, 64, 256):
        assert equal_bits(out, run(shape, requests, block_size=block_size))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 3, 40, 100])
@pytest.mark.parametrize("heads", [(12, 4, 64), (5, 1, 80), (4, 4, 8)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_spans_and_their_gates(dtype: torch.dtype, heads: tuple[int, int, int], window: int, softcap: float) -> None:
    query_heads, kv_heads, head_size = heads
    shape = Shape(
        dtype=dtype,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        window=window,
        softcap=softcap,
    )
    requests = gated(shape)
    out = run(shape, requests)
    assert_near(out, reference(shape, requests))
    # Negative controls: the gates of two spans swapped, and none at all.
    for request in requests:
        request.log_gates[:] = request.log_gates.flip(1)
    assert (out - reference(shape, requests)).abs().max() > 0.1
    for request in requests:
        request.log_gates.zero_()
    assert (out - reference(shape, requests)).abs().max() > 0.1


def test_a_gate_of_one_has_the_bits_of_no_gate() -> None:
    for shape in (Shape(), Shape(dtype=BFLOAT16, window=37, softcap=5.0)):
        requests = [*mixed(shape), shape.request(40, 40, 9, 70)]
        assert equal_bits(run(shape, requests), run(shape, requests, says_gates=True))
        # Nor does a neighbour's gate, because of which the step has them all.
        beside = run(shape, [*requests, shape.request(1, 1, 5, gated=True)])
        assert equal_bits(run(shape, requests), beside[:-1])


def test_the_less_a_span_weighs_the_less_it_is_there() -> None:
    shape = Shape(scale=2.0)
    request = shape.request(90, 90, 8)
    without = run(shape, [replace(request, virtual_keys=[], virtual_values=[], log_gates=torch.zeros(90, 0))])
    far = [
        (run(shape, [replace(request, log_gates=torch.full((90, 1), gate))]) - without).abs().max().item()
        for gate in (0.0, -4.0, -8.0, -16.0, -60.0)
    ]
    assert far == sorted(far, reverse=True)
    assert far[0] > 0.5
    assert far[-1] < 1e-6


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("closed", [torch.arange(90), torch.arange(0, 90, 2), torch.tensor([7])])
def test_a_row_does_not_see_a_span_at_minus_infinity_even_if_it_holds_nan(dtype: torch.dtype, closed: Tensor) -> None:
    """Neighbouring rows in the same registers do see it, and keep their own bits."""
    shape = Shape(dtype=dtype)
    request = shape.request(90, 90, 70, 5)
    request.log_gates[:] = torch.tensor([0.5, -0.5])
    opened = run(shape, [request])
    request.log_gates[closed, 0] = -torch.inf
    before = run(shape, [request])
    alone = replace(
        request,
        virtual_keys=request.virtual_keys[1:],
        virtual_values=request.virtual_values[1:],
        log_gates=request.log_gates[:, 1:],
    )
    assert equal_bits(before[closed], run(shape, [alone])[closed])  # there is no window: positions do not matter
    others = torch.ones(90, dtype=torch.bool)
    others[closed] = False
    assert equal_bits(before[others], opened[others])
    request.virtual_keys[0][:], request.virtual_values[0][:] = NAN, NAN
    after = run(shape, [request])
    assert equal_bits(after[closed], before[closed])
    assert after[others].isnan().all()  # and keys that a row does see are not hidden


def test_gates_are_read_by_each_call() -> None:
    """A mixture rewrites them between two layers."""
    shape = Shape()
    cache = empty_cache(3, 16, 2, 32)
    for tensor in (cache.keys, cache.values):
        tensor.normal_()
    query, gates = torch.randn(20, 6, 32), torch.zeros(20, 1)
    batch = changed_in(
        one_request(20),
        virtual_lens=torch.tensor([[7]], dtype=torch.int32),
        block_tables=torch.tensor([[2, 0, 1]], dtype=torch.int32),
        log_gates=gates,
    )
    first, second, again = torch.empty(3, 20, 6, 32)
    attention.attend(query, cache, batch, first, scale=shape.scale)
    gates[10:] = -3.0
    attention.attend(query, cache, batch, second, scale=shape.scale)
    assert equal_bits(first[:10], second[:10])
    assert (first[10:] - second[10:]).abs().amax((1, 2)).min() > 1e-3
    gates.zero_()
    attention.attend(query, cache, batch, again, scale=shape.scale)
    assert equal_bits(first, again)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    shape = Shape(scale=40.0)
    requests = mixed(shape)
    torch.testing.assert_close(run(shape, requests).double(), reference(shape, requests), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(window=37, softcap=5.0),
        Shape(dtype=BFLOAT16, query_heads=12, kv_heads=4, head_size=64),
        Shape(query_heads=5, kv_heads=1, head_size=40),
    ],
)
def test_a_rows_bits_are_its_own(shape: Shape, num_threads: Callable[[int], None]) -> None:
    requests = [*mixed(shape), *gated(shape)]
    num_threads(2)
    together = run(shape, requests).split([r.num_queries for r in requests])
    backwards = run(shape, requests[::-1], spare_columns=7, spare_spans=2)
    reordered = backwards.split([r.num_queries for r in requests[::-1]])[::-1]
    num_threads(1)
    single = run(shape, requests).split([r.num_queries for r in requests])
    for request, *others in zip(requests, together, reordered, single, strict=True):
        alone = run(shape, [request])
        assert all(equal_bits(alone, other) for other in others)
        for first in range(request.num_real - request.num_queries, request.num_real, 11):  # every prefix, decoded
            row = first - request.num_real + request.num_queries
            assert equal_bits(run(shape, [shortened(request, first + 1, 1)])[0], alone[row])


def shortened(request: Request, num_real: int, num_queries: int) -> Request:
    return replace(
        request,
        keys=request.keys[:num_real],
        values=request.values[:num_real],
        queries=request.queries[:num_real],
        log_gates=request.log_gates[:num_real],
        num_queries=num_queries,
    )


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_of_a_prompt_have_the_bits_of_the_whole(dtype: torch.dtype, chunk: int) -> None:
    shape = Shape(dtype=dtype)
    request = shape.request(150, 150, 9, 70, gated=True)
    whole = run(shape, [request])
    ends = [*range(chunk, 150, chunk), 150]
    chunks = [run(shape, [shortened(request, end, end - start)]) for start, end in zip([0, *ends], ends, strict=False)]
    assert equal_bits(torch.cat(chunks), whole)


def test_the_bit_detector_detects() -> None:
    """A change in the last place of one visible key changes the rows that see the key, and no others."""
    shape = Shape()
    request = shape.request(40, 40)
    before = run(shape, [request])
    request.keys.view(torch.int32)[30] += 1
    after = run(shape, [request])
    assert equal_bits(before[:30], after[:30])
    assert not equal_bits(before[30:], after[30:])


def test_keys_that_a_row_does_not_see_may_hold_anything() -> None:
    """Later tokens of the same request, and tokens before its window; `run` fills all other places with NaN anyway."""
    shape = Shape(window=20)
    request = shape.request(100, 100, 30)
    before = run(shape, [request])
    for tensor in (request.keys, request.values):
        tensor[60:] = NAN
    after = run(shape, [request])
    assert equal_bits(before[:60], after[:60])
    assert after[60:].isnan().all()  # and keys that a row does see are not hidden
    for tensor in (*request.virtual_keys, *request.virtual_values, request.keys, request.values):
        tensor[:] = NAN
    request.keys[81:], request.values[81:] = torch.randn(2, 19, 2, 32)
    assert run(shape, [replace(request, num_queries=1)]).isnan().all()  # sees real 80 .. 99
    request.keys[80], request.values[80] = torch.randn(2, 2, 32)
    assert run(shape, [replace(request, num_queries=1)]).isfinite().all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_heads_may_be_strided(dtype: torch.dtype) -> None:
    """As models pass them: [Hq, T, D] viewed as [T, Hq, D]."""
    key, value = torch.randn(2, 2, 20, 64).to(dtype)[..., 16:48].transpose(1, 2)
    query = torch.randn(6, 20, 64).to(dtype)[..., :32].transpose(0, 1)
    cache = empty_cache(2, 16, 2, 32, dtype=dtype)
    attention.store(key, value, cache, torch.arange(20))
    assert torch.equal(cache.keys.flatten(0, 1)[:20], key)
    assert torch.equal(cache.values.flatten(0, 1)[:20], value)
    out, expected = torch.empty(2, 20, 6, 32, dtype=dtype)
    attention.attend(query, cache, one_request(20), out, scale=0.2)
    attention.attend(query.contiguous(), cache, one_request(20), expected, scale=0.2)
    assert equal_bits(out, expected)


def empty_cache(*shape: int, dtype: torch.dtype = FLOAT32) -> attention.Cache:
    return attention.Cache(keys=torch.zeros(shape, dtype=dtype), values=torch.zeros(shape, dtype=dtype))


def packed(**fields: Tensor | None) -> attention.Packed:
    """Return packed paging of these fields, for rows that are stored elsewhere."""
    return attention.pack(Paging(torch.empty(0), **fields))  # type: ignore[arg-type]


def changed_in(given: attention.Packed, **fields: Tensor) -> attention.Packed:
    return attention.pack(given.paging._replace(**fields))


def one_request(num_tokens: int) -> attention.Packed:
    return packed(
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        virtual_lens=torch.zeros(1, 1, dtype=torch.int32),
        block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
    )


def test_an_empty_step() -> None:
    shape = Shape()
    assert run(shape, [shape.request(5, 0)]).shape == (0, 6, 32)


def test_misuse_is_named() -> None:
    cache = empty_cache(2, 16, 2, 32)
    key, query, batch = torch.randn(20, 2, 32), torch.randn(20, 6, 32), one_request(20)
    slots, out = torch.arange(20), torch.zeros(20, 6, 32)

    def attend(query: Tensor = query, batch: attention.Packed = batch, out: Tensor = out, **options: float) -> None:
        attention.attend(query, cache, batch, out, scale=0.2, **options)  # type: ignore[arg-type]

    def changed(**changes: list) -> attention.Packed:
        return changed_in(batch, **{name: torch.tensor(value, dtype=torch.int32) for name, value in changes.items()})

    bad_calls: list[tuple[str, Callable[[], object]]] = [
        ("values: needs the shape", lambda: attention.Cache(keys=cache.keys, values=cache.values[:1])),
        ("keys: needs contiguous", lambda: attention.Cache(keys=cache.keys[:, ::2], values=cache.values[:, ::2])),
        ("keys: needs contiguous", lambda: attention.Cache(keys=cache.keys.half(), values=cache.values.half())),
        ("a multiple of 8 up to 256", lambda: empty_cache(1, 1, 1, 12)),
        ("a multiple of 8 up to 256", lambda: empty_cache(1, 1, 1, 264)),
        ("no empty dimension", lambda: empty_cache(0, 16, 1, 64)),
        ("key: needs .20, 2, 32. torch.float32", lambda: attention.store(key.bfloat16(), key, cache, slots)),
        ("value: needs .20, 2, 32", lambda: attention.store(key, key[:, :1], cache, slots)),
        ("value: needs a contiguous", lambda: attention.store(key, key.mT.contiguous().mT, cache, slots)),
        ("kv_slots: needs", lambda: attention.store(key, key, cache, slots.int())),
        ("kv_slots: needs", lambda: attention.store(key, key, cache, slots[:19])),
        ("kv_slots: one is outside", lambda: attention.store(key, key, cache, slots + 13)),
        ("kv_slots: one is outside", lambda: attention.store(key, key, cache, slots - 1)),
        ("query: needs", lambda: attend(query[..., :16])),
        ("query: carries a gradient", lambda: attend(query.clone().requires_grad_())),
        ("multiple of the 2 KV heads", lambda: attend(query[:, :5], out=out[:, :5].contiguous())),
        ("out: needs .20, 6, 32", lambda: attend(out=out[:19])),
        ("out: needs to be contiguous", lambda: attend(out=torch.zeros(6, 20, 32).transpose(0, 1))),
        ("window, softcap", lambda: attend(window=-1)),
        ("window, softcap", lambda: attend(softcap=NAN)),
        ("query_start: needs", lambda: changed(query_start=[0])),
        ("block_tables: needs", lambda: changed(block_tables=[0, 1])),
        ("block_tables: needs", lambda: changed_in(batch, block_tables=torch.zeros(1, 2))),
        ("need to rise from 0", lambda: attend(batch=changed(query_start=[0, 19]))),
        ("need to rise from 0", lambda: attend(batch=changed(context_lens=[19]))),
        ("need to rise from 0", lambda: attend(batch=changed(context_lens=[33]))),
        ("need to rise from 0", lambda: attend(batch=changed(virtual_lens=[[1]]))),
        ("need to rise from 0", lambda: attend(batch=changed(virtual_lens=[[-1]]))),
        ("need to rise from 0", lambda: attend(batch=changed(virtual_lens=[[16, -16]]))),
        ("need to rise from 0", lambda: attend(batch=changed(virtual_lens=[[0, 1]]))),
        ("virtual_lens: needs contiguous .1, 0", lambda: changed(virtual_lens=[])),
        ("virtual_lens: needs contiguous .1, 1", lambda: changed(virtual_lens=[[0], [0]])),
        ("log_gates: needs contiguous .20, 1. float32", lambda: changed_in(batch, log_gates=torch.zeros(20, 2))),
        ("log_gates: needs contiguous .20, 1. float32", lambda: changed_in(batch, log_gates=torch.zeros(20, 1).int())),
        ("log_gates: needs contiguous .0, 1. float32", lambda: changed_in(batch, log_gates=torch.tensor(0.0))),
        ("log_gates: need one row", lambda: attend(batch=changed_in(batch, log_gates=torch.zeros(19, 1)))),
        ("block_tables: a block", lambda: attend(batch=changed(block_tables=[[0, 2]]))),
        ("block_tables: a block", lambda: attend(batch=changed(block_tables=[[-1, 1]]))),
    ]  # fmt: skip
    for text, call in bad_calls:
        with pytest.raises(ValueError, match=text):
            call()
    assert not out.any()
    assert not cache.keys.any()
    unread = -(10**6)  # before the window: a number that would cause a crash if it were read
    attend(query[-1:], changed(query_start=[0, 1], block_tables=[[unread, 1]]), out[:1], window=4)
    # Spans of 3 and 16 at 0 .. 2 and 3 .. 18, then 20 tokens, the last at 38: with a window of 23 the second is seen.
    spans = changed(query_start=[0, 1], virtual_lens=[[3, 16]], block_tables=[[unread, 0, 0, 1]])
    attend(query[-1:], spans, out[:1], window=23)
    with pytest.raises(ValueError, match="block_tables: a block"):
        attend(query[-1:], spans, out[:1], window=37)


def test_one_call_may_be_larger_than_a_chunk_and_serial_or_parallel() -> None:
    """More query heads of one KV head than a prefill chunk has rows."""
    shape = Shape(query_heads=71, kv_heads=1, head_size=64)
    requests = [shape.request(90, 90), shape.request(3, 1)]
    assert_near(run(shape, requests), reference(shape, requests))
