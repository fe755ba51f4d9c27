"""Launches of bottleneck adapters besides shrink and expand, on whole rows: one program for each entry.

z, float32 [N, O], has a row for every entry: first the input of f, then, for the normed kind alone, its delta.
"""

# Kernels are Triton, which only looks like Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.cuda.call import Call
from weft.kernels.cuda.tables import (
    BOTTLENECK,
    BOTTLENECK_NORMED,
    BOTTLENECK_RESIDUAL,
    BOTTLENECK_SUM,
    BY_STEP,
    activate,
    down_bias_of,
    expansion_of,
    line_of,
    norm_of,
    products_at,
)


def fill(call: Call, y: Tensor, residual: Tensor) -> None:
    """Write the networks' inputs to `call.z`; `residual` [T, O] may hold anything if no network reads it."""
    width = triton.next_power_of_2(call.size_out)
    _fill[(call.num_entries,)](
        y, y.stride(0), residual, residual.stride(0), call.rows_of,
        call.entries.slots, call.entries.gates, call.table, call.z,
        call.num_rows, call.size_out, WIDTH=width, num_warps=_warps_of(width),
    )  # fmt: skip


def finish(call: Call, y: Tensor) -> None:
    """Write the deltas of the normed kind to `call.z`, once `call.hidden` is filled."""
    width = triton.next_power_of_2(call.size_out)
    _finish[(call.num_entries,)](
        y, y.stride(0), call.rows_of,
        call.entries.slots, call.entries.gates, call.table, call.hidden, call.z,
        call.num_rows, call.num_entries, call.width, call.size_out,
        WEIGHT=call.weight, PARTS=call.num_parts, WIDTH=width, num_warps=_warps_of(width),
    )  # fmt: skip


def _warps_of(width: int) -> int:
    """Return enough warps for a row to stay in registers."""
    return min(16, max(4, width // 1024))


@triton.jit
def _normalize(v, b, rank, o, size, eps):
    """Return the layer norm of a row; gain and bias follow b_up."""
    inside = o < size
    mean = tl.sum(tl.where(inside, v, 0.0), 0) / size
    centered = tl.where(inside, v - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 0) / size + eps)
    gain = down_bias_of(b) + rank + size
    return centered * scale * tl.load(gain + o, mask=inside, other=0.0) + tl.load(
        gain + size + o, mask=inside, other=0.0
    )


@triton.jit(do_not_specialize=BY_STEP)
def _fill(y, y_stride, r, r_stride, rows_of, slots, gates, table, z, num_rows, size, WIDTH: tl.constexpr):
    """z[n] = the input of f."""
    n = tl.program_id(0)
    row = tl.load(rows_of + n).to(tl.int64)
    if (row < num_rows) & (tl.load(gates + n) != 0.0):
        kind, rank, _, b = line_of(table, tl.load(slots + n))
        if kind >= BOTTLENECK:
            o = tl.arange(0, WIDTH)
            inside = o < size
            v = tl.load(y + row * y_stride + o, mask=inside & (kind != BOTTLENECK_RESIDUAL), other=0.0).to(tl.float32)
            if (kind == BOTTLENECK_SUM) | (kind == BOTTLENECK_RESIDUAL):
                stream = tl.load(r + row * r_stride + o, mask=inside, other=0.0).to(tl.float32)
                v = stream if kind == BOTTLENECK_RESIDUAL else v + stream
            has_norm, eps = norm_of(b)
            if has_norm & (kind != BOTTLENECK_NORMED):
                v = _normalize(v, b, rank, o, size, eps)
            tl.store(z + n.to(tl.int64) * size + o, v, mask=inside)


@triton.jit(do_not_specialize=BY_STEP)
def _finish(
    y, y_stride, rows_of, slots, gates, table, hidden, z, num_rows, num_entries, width, size,
    WEIGHT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """z[n] = LN(y + f(y)) - y, since a norm needs the whole row before expand can take it in blocks."""
    n = tl.program_id(0)
    row = tl.load(rows_of + n).to(tl.int64)
    if (row < num_rows) & (tl.load(gates + n) != 0.0):
        kind, rank, a, b = line_of(table, tl.load(slots + n))
        if kind == BOTTLENECK_NORMED:
            o = tl.arange(0, WIDTH)
            inside = o < size
            base = tl.load(y + row * y_stride + o, mask=inside, other=0.0).to(tl.float32)
            from_b = expansion_of(kind, rank, a, b, size, WEIGHT)
            from_hidden = products_at(hidden, tl.arange(0, PARTS), 0, n, num_entries, width, 1)
            added = tl.load(down_bias_of(b) + rank + o, mask=inside, other=0.0)
            for k in range(rank):
                h = activate(b, tl.sum(tl.load(from_hidden + k), 0) + tl.load(down_bias_of(b) + k))
                added += h * tl.load(from_b + k * size + o, mask=inside, other=0.0).to(tl.float32)
            _, eps = norm_of(b)
            v = _normalize(base + added, b, rank, o, size, eps)
            tl.store(z + n.to(tl.int64) * size + o, v - base, mask=inside)
