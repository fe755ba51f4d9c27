"""Deltas of a few rows, each by itself: decode steps, where every request has one row and any adapter.

A program of shrink takes some ranks of one entry and a part of the inputs. A program of expand takes some outputs of
one row; it adds the parts in order, then the row's entries in order. Nothing is added atomically, and blocks have the
same size in every batch, so a row's bits do not depend on the other rows.
"""

# Kernels are Triton, which only looks like Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.cuda.call import RANKS, Call, part_size_of
from weft.kernels.cuda.tables import (
    BIAS,
    BOTTLENECK,
    BOTTLENECK_NORMED,
    BY_STEP,
    LORA,
    SCALE_INPUT,
    SCALE_OUTPUT,
    activate,
    down_bias_of,
    expansion_of,
    line_of,
    matrix_at,
    output_block,
    products_at,
)

_BLOCK = 256  # inputs per iteration of shrink's loop; outputs per program of expand


def shrink(call: Call, x: Tensor, *, of_networks: bool) -> None:
    """Fill `call.hidden` from `x`: for LoRAs, rows [T, I]; for networks, rows of their own, [N, O]."""
    size = x.shape[1]
    _shrink[(call.num_entries, call.group * call.width // RANKS, call.num_parts)](
        x, x.stride(0), call.rows_of,
        call.entries.slots, call.entries.gates, call.table, call.table.stride(0), call.hidden,
        call.num_rows, call.num_entries, call.width, size, part_size_of(size, call.num_parts, _BLOCK),
        GROUP=call.group, NETWORKS=of_networks, WEIGHT=call.weight, RANKS=RANKS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def expand(call: Call, y: Tensor) -> None:
    """Add all deltas to `y` [T, O], in place."""
    _expand[(call.num_rows, call.num_output_blocks(_BLOCK))](
        y, y.stride(0), *call.entries, call.table, call.table.stride(0), call.hidden, call.z,
        call.num_entries, call.width, *call.three_sizes,
        GROUP=call.group, WEIGHT=call.weight, PARTS=call.num_parts, RANKS=RANKS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def scale_inputs(x: Tensor, out: Tensor, offsets: Tensor, slots: Tensor, gates: Tensor, table: Tensor) -> None:
    """Write x [T, I] with its gated input scales to `out` [T, I]."""
    num_rows, size = x.shape
    _scale_inputs[(num_rows, triton.cdiv(size, _BLOCK))](
        x, x.stride(0), out, out.stride(0), offsets, slots, gates, table, size, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit(do_not_specialize=BY_STEP)
def _shrink(
    x, x_stride, rows_of, slots, gates, table, table_stride, hidden, num_rows, num_entries, width, size, part_size,
    GROUP: tl.constexpr, NETWORKS: tl.constexpr, WEIGHT: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden[part, site, n, k] = A[k] · x over a part of the inputs; for networks, `x` has a row for every entry."""
    n = tl.program_id(0)
    num_blocks = width // RANKS
    site = tl.program_id(1) // num_blocks
    first_rank = tl.program_id(1) % num_blocks * RANKS
    table += site * table_stride
    part = tl.program_id(2)
    row = tl.load(rows_of + n)
    if (row < num_rows) & (tl.load(gates + n) != 0.0):
        kind, rank, a, _ = line_of(table, tl.load(slots + n))
        is_mine = kind >= BOTTLENECK if NETWORKS else kind == LORA
        if is_mine & (first_rank < rank):
            k = first_rank + tl.arange(0, RANKS)
            lanes = tl.arange(0, BLOCK)
            from_x = x + (n if NETWORKS else row).to(tl.int64) * x_stride
            from_a = matrix_at(a, WEIGHT) + k[:, None] * size
            total = tl.zeros([RANKS, BLOCK], tl.float32)
            for begin in range(part * part_size, tl.minimum((part + 1) * part_size, size), BLOCK):
                i = begin + lanes
                values = tl.load(from_x + i, mask=i < size, other=0.0).to(tl.float32)
                weights = tl.load(from_a + i[None, :], mask=(k < rank)[:, None] & (i < size)[None, :], other=0.0)
                total += values[None, :] * weights.to(tl.float32)
            at = products_at(hidden, part, site, n, num_entries, width, GROUP)
            tl.store(at + k, tl.where(k < rank, tl.sum(total, 1), 0.0))  # expand reads whole blocks


@triton.jit(do_not_specialize=BY_STEP)
def _expand(
    y, y_stride, offsets, slots, gates, table, table_stride, hidden, z, num_entries, width, size_0, size_1, size_2,
    GROUP: tl.constexpr, WEIGHT: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t] += Σ gate · delta, for a block of outputs; a row without effect is not written."""
    row = tl.program_id(0)
    site, begin, size, before = output_block(tl.program_id(1), size_0, size_1, size_2, GROUP, BLOCK)
    table += site * table_stride
    o = before + tl.arange(0, BLOCK)
    inside = o < size
    at = y + row.to(tl.int64) * y_stride + begin + o
    base = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = base
    parts = tl.arange(0, PARTS)
    ranks = tl.arange(0, RANKS)
    is_live = 0
    first = tl.load(offsets + row)
    for place in range(tl.load(offsets + row + 1) - first):
        n = first + place
        gate = tl.load(gates + n)
        if gate != 0.0:
            kind, rank, a, b = line_of(table, tl.load(slots + n))
            if kind == BOTTLENECK_NORMED:
                total += gate * tl.load(z + n.to(tl.int64) * size + o, mask=inside, other=0.0)
                is_live = 1
            elif (kind == LORA) | (kind >= BOTTLENECK):
                from_b = expansion_of(kind, rank, a, b, size, WEIGHT)
                delta = tl.zeros([BLOCK], tl.float32)
                for first_rank in range(0, rank, RANKS):
                    k = first_rank + ranks
                    from_hidden = products_at(hidden, parts, site, n, num_entries, width, GROUP)[:, None] + k[None, :]
                    h = tl.sum(tl.load(from_hidden), 0)
                    if kind != LORA:
                        down_bias = tl.load(down_bias_of(b) + k, mask=k < rank, other=0.0)
                        h = tl.where(k < rank, activate(b, h + down_bias), 0.0)
                    mask = (k < rank)[:, None] & inside[None, :]
                    weights = tl.load(from_b + k[:, None] * size + o[None, :], mask=mask, other=0.0)
                    delta += tl.sum(h[:, None] * weights.to(tl.float32), 0)
                if kind != LORA:
                    delta += tl.load(down_bias_of(b) + rank + o, mask=inside, other=0.0)
                total += gate * delta
                is_live = 1
            elif kind == SCALE_OUTPUT:
                scale = tl.load(matrix_at(a, tl.float32) + o, mask=inside, other=1.0)
                total += gate * ((scale - 1.0) * base)
                is_live = 1
            elif kind == BIAS:
                total += gate * tl.load(matrix_at(a, tl.float32) + o, mask=inside, other=0.0)
                is_live = 1
    if is_live != 0:
        tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=BY_STEP)
def _scale_inputs(x, x_stride, out, out_stride, offsets, slots, gates, table, size, BLOCK: tl.constexpr):
    """out[t] = x[t] + Σ gate · (l - 1) · x[t], for a block of inputs; a row without effect is copied unchanged."""
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    given = tl.load(x + row.to(tl.int64) * x_stride + i, mask=inside)
    base = given.to(tl.float32)
    total = base
    is_live = 0
    first = tl.load(offsets + row)
    for place in range(tl.load(offsets + row + 1) - first):
        n = first + place
        gate = tl.load(gates + n)
        if gate != 0.0:
            kind, _, a, _ = line_of(table, tl.load(slots + n))
            if kind == SCALE_INPUT:
                scale = tl.load(matrix_at(a, tl.float32) + i, mask=inside, other=1.0)
                total += gate * ((scale - 1.0) * base)
                is_live = 1
    at = out + row.to(tl.int64) * out_stride + i
    if is_live != 0:
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(at, given, mask=inside)
