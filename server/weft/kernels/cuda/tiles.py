"""Deltas of many rows, one tile of consecutive rows at a time: prefill, where runs of rows have the same adapters.

A tile takes its rows' entries by their place, and at each place one slot after another. A tile inside a prompt has one
slot there, and reads its weights once, on tensor cores. The rows that share a slot are found on the device. Sums have
the order of kernels/cuda/lone_rows.py, in the blocks of tensor cores. What a row's neighbours hold never changes its
bits.
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
    SCALE_OUTPUT,
    activate,
    add_product,
    down_bias_of,
    expansion_of,
    line_of,
    matrix_at,
    output_block,
    products_at,
)

_ROWS = 32  # of a tile
_INPUTS = 64  # per iteration of shrink's loop
_OUTPUTS = 128  # per program of expand
_NO_SLOT = tl.constexpr(2**31 - 1)


def shrink(call: Call, x: Tensor, *, of_networks: bool) -> None:
    """Do the same as kernels/cuda/lone_rows.py."""
    size = x.shape[1]
    _shrink[(triton.cdiv(call.num_rows, _ROWS), call.group * call.width // RANKS, call.num_parts)](
        x, x.stride(0), *call.entries, call.table, call.table.stride(0), call.hidden,
        call.num_rows, call.num_entries, call.width, size, part_size_of(size, call.num_parts, _INPUTS),
        GROUP=call.group, NETWORKS=of_networks, WEIGHT=call.weight, ROWS=_ROWS, RANKS=RANKS, BLOCK=_INPUTS, num_warps=4,
    )  # fmt: skip


def expand(call: Call, y: Tensor) -> None:
    """Do the same as kernels/cuda/lone_rows.py."""
    _expand[(triton.cdiv(call.num_rows, _ROWS), call.num_output_blocks(_OUTPUTS))](
        y, y.stride(0), *call.entries, call.table, call.table.stride(0), call.hidden, call.z,
        call.num_rows, call.num_entries, call.width, *call.three_sizes,
        GROUP=call.group, WEIGHT=call.weight, PARTS=call.num_parts,
        ROWS=_ROWS, RANKS=RANKS, BLOCK=_OUTPUTS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _entries_of(offsets, rows, num_rows):
    """Return each row's first entry and its number of entries."""
    first = tl.load(offsets + rows, mask=rows < num_rows, other=0)
    return first, tl.load(offsets + rows + 1, mask=rows < num_rows, other=0) - first


@triton.jit
def _taken(slots, gates, table, n, has_entry):
    """Return the gates, slots and kinds of a tile's entries; an entry of gate 0 has kind 0, whatever its slot holds."""
    gate = tl.load(gates + n, mask=has_entry, other=0.0)
    slot = tl.load(slots + n, mask=has_entry, other=0)
    kind = tl.load(table + slot.to(tl.int64) * 4, mask=gate != 0.0, other=0)
    return gate, slot, kind


@triton.jit(do_not_specialize=BY_STEP)
def _shrink(
    x, x_stride, offsets, slots, gates, table, table_stride, hidden, num_rows, num_entries, width, size, part_size,
    GROUP: tl.constexpr, NETWORKS: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden[part, site, n, k] = A[k] · x over a part of the inputs; for networks, `x` has a row for every entry."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_blocks = width // RANKS
    site = tl.program_id(1) // num_blocks
    first_rank = tl.program_id(1) % num_blocks * RANKS
    table += site * table_stride
    part = tl.program_id(2)
    k = first_rank + tl.arange(0, RANKS)
    lanes = tl.arange(0, BLOCK)
    first_entry, counts = _entries_of(offsets, rows, num_rows)
    for place in range(tl.max(counts, 0)):
        n = first_entry + place
        _gate, slot, kind = _taken(slots, gates, table, n, place < counts)
        pending = kind >= BOTTLENECK if NETWORKS else kind == LORA
        while tl.max(pending.to(tl.int32), 0) > 0:
            this = tl.min(tl.where(pending, slot, _NO_SLOT), 0)
            mine = pending & (slot == this)
            _kind, rank, a, _b = line_of(table, this)
            if first_rank < rank:
                from_x = x + (n if NETWORKS else rows).to(tl.int64)[:, None] * x_stride
                from_a = matrix_at(a, WEIGHT) + k[None, :] * size
                total = tl.zeros([ROWS, RANKS], tl.float32)
                for begin in range(part * part_size, tl.minimum((part + 1) * part_size, size), BLOCK):
                    i = begin + lanes
                    values = tl.load(from_x + i[None, :], mask=mine[:, None] & (i < size)[None, :], other=0.0)
                    weights = tl.load(from_a + i[:, None], mask=(k < rank)[None, :] & (i < size)[:, None], other=0.0)
                    if values.dtype == weights.dtype:
                        total = tl.dot(values, weights, total, input_precision="ieee")
                    elif values.dtype == tl.float32:
                        total = add_product(total, values, weights)
                    else:
                        total = tl.dot(values.to(tl.float32), weights, total, input_precision="ieee")
                at = products_at(hidden, part, site, n, num_entries, width, GROUP)[:, None] + k[None, :]
                total = tl.where((k < rank)[None, :], total, 0.0)  # expand reads whole blocks
                tl.store(at, total, mask=mine[:, None])
            pending = pending & (slot != this)


@triton.jit(do_not_specialize=BY_STEP)
def _expand(
    y, y_stride, offsets, slots, gates, table, table_stride, hidden, z, num_rows, num_entries, width,
    size_0, size_1, size_2, GROUP: tl.constexpr, WEIGHT: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t] += Σ gate · delta, for a block of outputs of a tile's rows; a row without effect is not written."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    site, begin, size, before = output_block(tl.program_id(1), size_0, size_1, size_2, GROUP, BLOCK)
    table += site * table_stride
    o = before + tl.arange(0, BLOCK)
    inside = o < size
    ranks = tl.arange(0, RANKS)
    at = y + rows.to(tl.int64)[:, None] * y_stride + begin + o[None, :]
    base = tl.load(at, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = base
    is_live = tl.zeros([ROWS], tl.int32)
    first_entry, counts = _entries_of(offsets, rows, num_rows)
    for place in range(tl.max(counts, 0)):
        n = first_entry + place
        gate, slot, kinds = _taken(slots, gates, table, n, place < counts)
        pending = (kinds == LORA) | (kinds == SCALE_OUTPUT) | (kinds >= BIAS)
        is_live = tl.where(pending, 1, is_live)
        while tl.max(pending.to(tl.int32), 0) > 0:
            this = tl.min(tl.where(pending, slot, _NO_SLOT), 0)
            mine = pending & (slot == this)
            mask = mine[:, None] & inside[None, :]
            kind, rank, a, b = line_of(table, this)
            delta = tl.zeros([ROWS, BLOCK], tl.float32)
            if kind == BOTTLENECK_NORMED:
                delta = tl.load(z + n.to(tl.int64)[:, None] * size + o[None, :], mask=mask, other=0.0)
            elif (kind == LORA) | (kind >= BOTTLENECK):
                from_b = expansion_of(kind, rank, a, b, size, WEIGHT)
                for first_rank in range(0, rank, RANKS):
                    k = first_rank + ranks
                    h = tl.zeros([ROWS, RANKS], tl.float32)
                    for part in tl.static_range(PARTS):
                        from_hidden = products_at(hidden, part, site, n, num_entries, width, GROUP)
                        h += tl.load(from_hidden[:, None] + k[None, :], mask=mine[:, None], other=0.0)
                    if kind != LORA:
                        down_bias = tl.load(down_bias_of(b) + k, mask=k < rank, other=0.0)
                        h = tl.where(mine[:, None] & (k < rank)[None, :], activate(b, h + down_bias[None, :]), 0.0)
                    weight_mask = (k < rank)[:, None] & inside[None, :]
                    weights = tl.load(from_b + k[:, None] * size + o[None, :], mask=weight_mask, other=0.0)
                    delta = add_product(delta, h, weights)
                if kind != LORA:
                    delta += tl.load(down_bias_of(b) + rank + o, mask=inside, other=0.0)[None, :]
            elif kind == SCALE_OUTPUT:
                scale = tl.load(matrix_at(a, tl.float32) + o, mask=inside, other=1.0)
                delta = (scale - 1.0)[None, :] * base
            else:
                delta += tl.load(matrix_at(a, tl.float32) + o, mask=inside, other=0.0)[None, :]
            total = tl.where(mine[:, None], total + gate[:, None] * delta, total)
            pending = pending & (slot != this)
    tl.store(at, total.to(y.dtype.element_ty), mask=(is_live > 0)[:, None] & inside[None, :])
