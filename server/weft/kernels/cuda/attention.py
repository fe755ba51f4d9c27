"""Attention over a paged KV cache on CUDA: the Triton kernels of one layer's step.

Shapes as in kernels/cpu/attention.py: T query rows, B requests, Hq query heads, Hkv KV heads, D head size, S spans. The
softmax is float32; products take the pool's dtype and accumulate in float32.

A *tile* (kernels/cuda/steps.py) is the work of one program: consecutive query rows of one request, times the query
heads of one KV head, since these read the same keys. Keys come in runs, span after span and then the real tokens, so
that a row has one log-gate for each run. The *logical* index of a key is its place in the block table's order, counting
holes.

If a request has a single row, many programs compute it, each for its share of the logical keys, and `_join` adds their
sums in order. A row's bits depend on its own query, keys and gates, on its place among its request's rows, and on
shapes, but not on what neighbours hold.
"""

# Triton's language is typed for its compiler, not for checkers.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.cuda.steps import Plan, Tiles, plan
from weft.kernels.step import Paging

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_SIZE_MAX = 256
_UNBOUNDED = 1 << 30  # a window that hides nothing
_LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of two: e^s = 2^(s log2 e)
_NEVER = tl.constexpr(float("-inf"))


class Attend:
    """Paged attention over one KV pool; `keys`, `values`: one tensor per layer, [num_blocks, block_size, Hkv, D].

    Raises ValueError for a pool that the kernels do not support.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for name, pools in (("keys", keys), ("values", values)):
            for given in pools:
                if given.dim() != 4 or given.dtype not in _DTYPES or not given.is_contiguous():
                    raise ValueError(
                        f"{name}: needs contiguous [num_blocks, block_size, Hkv, D] bfloat16, float16 or float32, "
                        f"given {given.dtype} {list(given.shape)} with strides {given.stride()}"
                    )
                if given.shape[3] > _HEAD_SIZE_MAX:
                    raise ValueError(f"{name}: needs D up to {_HEAD_SIZE_MAX}, given {given.shape[3]}")
        self._pools = list(zip(keys, values, strict=True))
        self._paging: Paging | None = None
        self._layer = -1
        self._plan: Plan | None = None

    def __call__(
        self,
        paging: Paging,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Store this step's keys and values in `layer`, and return the attention [T, Hq, D]."""
        keys, values = self._pools[layer]
        # The first layer of a step makes the plan for all layers. A graph's paging is one object for many steps,
        # each of which has to plan again; since layers come in order, a step begins when the layer number does not
        # rise.
        if paging is not self._paging or layer <= self._layer or self._plan is None:
            self._paging = paging
            self._plan = plan(
                paging,
                num_rows=query.shape[0],
                query_heads=query.shape[1],
                kv_heads=keys.shape[2],
                head_bytes=query.shape[2] * query.element_size(),
                block_size=keys.shape[1],
            )
        self._layer = layer
        store(key, value, keys, values, paging.kv_slots)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend(query, keys, values, self._plan, out, scale=scale, window=window, softcap=softcap)
        return out


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_slots: Tensor) -> None:
    """Write a step's keys and values into the pool, in place.

    Semantics: keys.view(-1, Hkv, D)[kv_slots[t]] = key[t], and the values likewise; no slot may occur twice.

    key, value: [T, Hkv, D] of the pool's dtype, any token and head strides, D contiguous.
    kv_slots: [T] int64, contiguous.
    """
    num_rows, kv_heads, head_size = key.shape
    _check("key", key, keys)
    _check("value", value, values)
    if num_rows:
        _store[(num_rows, kv_heads)](
            key, value, keys, values, kv_slots, *key.stride()[:2], *value.stride()[:2],
            HEAD=head_size, PADDED=triton.next_power_of_2(head_size), num_warps=1,
        )  # fmt: skip


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    planned: Plan,
    out: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Write the attention of each query row over its request's stored keys to `out`, in place.

    Semantics: kernels/cpu/attention.py::attend. Rows that belong to no request are left as they are.

    query: [T, Hq, D] of the pool's dtype, any token and head strides, D contiguous.
    out: [T, Hq, D], contiguous, sharing no memory with query.
    """
    _check("query", query, keys)
    if query.shape[1] % keys.shape[2]:
        raise ValueError(f"query: needs a multiple of the {keys.shape[2]} KV heads, given {query.shape[1]} heads")
    for tiles in (planned.lone, planned.shared):
        if tiles is not None and len(tiles.requests):
            _compute(query, keys, values, planned, tiles, out, scale, window, softcap)


def _check(name: str, given: Tensor, pool: Tensor) -> None:
    if given.dtype is not pool.dtype or given.shape[-1] != pool.shape[-1] or given.stride(-1) != 1:
        raise ValueError(
            f"{name}: needs {pool.dtype} with a contiguous last dimension of {pool.shape[-1]}, "
            f"given {given.dtype} {list(given.shape)} with strides {given.stride()}"
        )


def _compute(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    planned: Plan,
    tiles: Tiles,
    out: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Run one kernel for the tiles, and one that joins their splits if there are several."""
    query_heads, head_size = query.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    group, padded = query_heads // kv_heads, max(16, triton.next_power_of_2(head_size))
    num_tiles, num_splits = len(tiles.requests), tiles.num_splits
    rows = max(16, triton.next_power_of_2(tiles.num_queries * group))
    sums = extents = None
    if num_splits > 1:
        sums = query.new_empty(num_tiles, query_heads, num_splits, head_size, dtype=torch.float32)
        extents = query.new_empty(num_tiles, query_heads, num_splits, 2, dtype=torch.float32)
    _, query_start, context_lens, virtual_lens, block_tables, log_gates = planned.paging
    tiling = (
        tiles.first_rows, tiles.requests, query_start, context_lens, virtual_lens,
        planned.num_requests, planned.num_spans, tiles.split,
    )  # fmt: skip
    _attend[(num_tiles, kv_heads, num_splits)](
        *tiling, query, keys, values, out, sums, extents, block_tables, log_gates,
        block_tables.stride(0), query.stride(0), query.stride(1), scale, window or _UNBOUNDED,
        SOFTCAP=softcap, GROUP=group, QUERIES=tiles.num_queries, HEAD=head_size, BLOCK=block_size,
        ROWS=rows, PADDED=padded, KEYS=64 if padded * query.element_size() <= 256 else 32,
        num_warps=8 if rows > 64 else 4, num_stages=3,
    )  # fmt: skip
    if num_splits > 1:
        _join[(num_tiles, query_heads)](
            *tiling, sums, extents, out, num_splits, HEAD=head_size, BLOCK=block_size, PADDED=padded, num_warps=1
        )


@triton.jit
def _store(
    key, value, keys, values, kv_slots, key_row, key_head, value_row, value_head,
    HEAD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store one head of one row."""
    row, head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, PADDED)
    to = (tl.load(kv_slots + row) * kv_heads + head) * HEAD + d
    tl.store(keys + to, tl.load(key + row * key_row + head * key_head + d, mask=d < HEAD), mask=d < HEAD)
    tl.store(values + to, tl.load(value + row * value_row + head * value_head + d, mask=d < HEAD), mask=d < HEAD)


@triton.jit
def _bounds(request, num_spans, virtual_lens, BLOCK: tl.constexpr):
    """Return a request's number of virtual positions, and the logical index of its first real token."""
    num_virtual, begin = 0, 0
    for s in tl.range(0, num_spans):
        length = tl.load(virtual_lens + request * num_spans + s)
        num_virtual += length
        begin += tl.cdiv(length, BLOCK) * BLOCK
    return num_virtual, begin


@triton.jit(do_not_specialize=["num_requests", "num_spans", "table_stride"])
def _attend(
    first_rows, requests, query_start, context_lens, virtual_lens, num_requests, num_spans, split,
    query, keys, values, out, sums, extents, block_tables, log_gates,
    table_stride, query_row, query_head, scale, window,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attend for one KV head of one tile, over one split of its keys; lane r has query r // GROUP and head r % GROUP.

    Writes `out`; or, if there are several splits, sum exp(s - peak) value to `sums` [N, Hq, splits, D], and the peak
    (in powers of two) and sum exp(s - peak) to `extents` [N, Hq, splits, 2].
    """
    tile, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    request = tl.load(requests + tile)
    if request == num_requests:
        return
    first, end_row = tl.load(first_rows + tile), tl.load(query_start + request + 1)
    num_virtual, real_begin = _bounds(request, num_spans, virtual_lens, BLOCK)
    shift = num_virtual + tl.load(context_lens + request) - end_row  # from a row to its position
    sees_from = tl.maximum(first + shift - window + 1, 0)
    sees_to = tl.minimum(first + QUERIES, end_row) + shift
    split_from = tl.program_id(2) * split
    split_to = split_from + split
    if split_from >= real_begin + sees_to - num_virtual:
        return

    lane, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    row = first + lane // GROUP
    lane_head = head * GROUP + lane % GROUP
    is_lane = (lane < QUERIES * GROUP) & (row < end_row)
    is_entry = is_lane[:, None] & (d < HEAD)[None, :]
    at = row.to(tl.int64)[:, None] * query_row + lane_head[:, None] * query_head + d[None, :]
    q = tl.load(query + at, mask=is_entry, other=0.0)
    position = tl.where(is_lane, row + shift, -1)
    table = block_tables + request.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    peak = tl.full([ROWS], _NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    run_begin, run_position = 0, 0
    for s in tl.range(0, num_spans):
        length = tl.load(virtual_lens + request * num_spans + s)
        begin = tl.maximum(tl.maximum(split_from - run_begin, sees_from - run_position), 0)
        end = tl.minimum(length, split_to - run_begin)
        gate = None
        if log_gates is not None:
            gate = tl.load(log_gates + row * num_spans + s, mask=is_lane, other=_NEVER)
            end = tl.where(tl.max(gate, 0) == _NEVER, begin, end)  # a span that no row sees is not read
        for index in tl.range(begin, end, KEYS):
            acc, peak, total = _visit(
                acc, peak, total, q, position, gate, index, end, run_begin, run_position,
                keys, values, table, head, kv_heads, scale, window, SOFTCAP, HEAD, BLOCK, PADDED, KEYS,
            )  # fmt: skip
        run_begin += tl.cdiv(length, BLOCK) * BLOCK
        run_position += length
    begin = tl.maximum(tl.maximum(split_from - real_begin, sees_from - num_virtual), 0)
    end = tl.minimum(sees_to - num_virtual, split_to - real_begin)
    for index in tl.range(begin, end, KEYS):
        acc, peak, total = _visit(
            acc, peak, total, q, position, None, index, end, real_begin, num_virtual,
            keys, values, table, head, kv_heads, scale, window, SOFTCAP, HEAD, BLOCK, PADDED, KEYS,
        )  # fmt: skip

    if sums is None:
        to = (row.to(tl.int64)[:, None] * kv_heads * GROUP + lane_head[:, None]) * HEAD + d[None, :]
        tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_entry)
    else:
        to = (tile.to(tl.int64) * kv_heads * GROUP + lane_head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(extents + to * 2, peak, mask=is_lane)
        tl.store(extents + to * 2 + 1, total, mask=is_lane)
        tl.store(sums + to[:, None] * HEAD + d[None, :], acc, mask=is_entry & (total != 0.0)[:, None])


@triton.jit
def _visit(
    acc, peak, total, q, position, gate, index, end, run_begin, run_position,
    keys, values, table, head, kv_heads, scale, window,
    SOFTCAP: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add the keys `index` to `index + KEYS - 1` of a run to the sums, only those before `end`."""
    key, d = index + tl.arange(0, KEYS), tl.arange(0, PADDED)
    is_key = key < end
    logical = run_begin + key
    block = tl.load(table + logical // BLOCK, mask=is_key, other=0).to(tl.int64)
    at = ((block * BLOCK + logical % BLOCK) * kv_heads + head) * HEAD
    k = tl.load(keys + at[None, :] + d[:, None], mask=is_key[None, :] & (d < HEAD)[:, None], other=0.0)
    v = tl.load(values + at[:, None] + d[None, :], mask=is_key[:, None] & (d < HEAD)[None, :], other=0.0)

    scores = tl.dot(q, k, input_precision="tf32x3") * scale
    if SOFTCAP != 0.0:
        scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 * scores / SOFTCAP) - 1.0)  # tanh
    distance = position[:, None] - (run_position + key)[None, :]
    sees = is_key[None, :] & (distance >= 0) & (distance < window)
    if gate is not None:
        scores += gate[:, None]
        sees &= (gate != _NEVER)[:, None]
    scores = tl.where(sees, scores * _LOG2_E, _NEVER)
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == _NEVER, 0.0, higher)  # while a row sees nothing yet, all weights are 0
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc *= shrink[:, None]
    if gate is not None:
        # A weight of 0 does not hide values that are not finite. Rows that see them get nan, and no others do.
        wide = v.to(tl.float32)
        is_bad = (wide - wide) != 0.0
        num_bad = tl.dot(sees.to(tl.float32).to(v.dtype), is_bad.to(tl.float32).to(v.dtype))
        acc = tl.where(num_bad > 0.0, float("nan"), acc)
        v = tl.where(is_bad, 0.0, wide).to(v.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, higher, total


@triton.jit(do_not_specialize=["num_requests", "num_spans", "num_splits"])
def _join(
    first_rows, requests, query_start, context_lens, virtual_lens, num_requests, num_spans, split,
    sums, extents, out, num_splits, HEAD: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Join the splits of one query head of a tile of one row, first to last."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    request = tl.load(requests + tile)
    if request == num_requests:
        return
    row, end_row = tl.load(first_rows + tile), tl.load(query_start + request + 1)
    _, real_begin = _bounds(request, num_spans, virtual_lens, BLOCK)
    num_keys = real_begin + tl.load(context_lens + request) - end_row + row + 1
    d = tl.arange(0, PADDED)
    at = (tile.to(tl.int64) * heads + head) * num_splits
    peak = tl.full([1], _NEVER, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([PADDED], tl.float32)
    for n in tl.range(0, tl.cdiv(num_keys, split)):
        here = tl.load(extents + (at + n) * 2 + tl.arange(0, 1))
        added = tl.load(extents + (at + n) * 2 + 1 + tl.arange(0, 1))
        part = tl.load(sums + (at + n) * HEAD + d, mask=(d < HEAD) & (added != 0.0), other=0.0)
        higher = tl.maximum(peak, here)
        base = tl.where(higher == _NEVER, 0.0, higher)
        shrink, weight = tl.exp2(peak - base), tl.exp2(here - base)
        acc = acc * shrink + part * weight
        total = total * shrink + added * weight
        peak = higher
    to = (row.to(tl.int64) * heads + head) * HEAD + d
    tl.store(out + to, (acc / total).to(out.dtype.element_ty), mask=d < HEAD)
