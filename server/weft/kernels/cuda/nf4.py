"""The product with a 4-bit NormalFloat weight on CUDA for few rows, which reads the weight as it is stored.

    y = x Wᵀ + b        W[n, k] = code[q[n, k]] · scales[n, k // 64], rounded to x's dtype

The stored form is that of bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314, section 3): 64 weights in a row of W
share a float32 scale, and a byte holds two, the first in its high half. W equals bitsandbytes' dequantization to the
bit; sums are float32.

For few rows, reading W takes all the time. Programs take 64 outputs each. If these are too few to fill a device, the
inputs are split too, and `_add_up` adds the splits in order. The number of splits depends on the weight's shape alone,
so a row's bits depend on no neighbour, nor on the number of rows up to 16, 32 and 64. The weight is the left factor,
since tensor cores want 64 rows there and take as few as 8 columns.

Shapes: M rows, I inputs, O outputs.
"""

# Triton's language is typed for its compiler, not for checkers.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_MAX = 64
BLOCK_SIZE = 64  # weights per scale
_OUTPUTS = 64
_PROGRAMS = 256  # keep enough bytes in flight on a device with 132 processors
_SPLITS_MAX = 8


def multiply(x: Tensor, packed: Tensor, scales: Tensor, code: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return [M, O] for `x` [M, I], M up to 64, any row stride.

    packed: uint8, O · I / 2 of them; I is a multiple of 64.
    scales: float32, O · I / 64 of them.
    code: float32 [16].
    bias: [O] of x's dtype.
    """
    num_rows, size_in = x.shape
    size_out = packed.numel() * 2 // size_in
    if num_rows > ROWS_MAX or size_in % BLOCK_SIZE or x.stride(1) != 1:
        raise ValueError(
            f"x: needs up to {ROWS_MAX} contiguous rows of a multiple of {BLOCK_SIZE} inputs, given {list(x.shape)} "
            f"with strides {x.stride()}"
        )
    if packed.dtype is not torch.uint8 or scales.dtype is not torch.float32 or code.dtype is not torch.float32:
        raise ValueError(
            f"packed, scales, code: need uint8, float32 and float32, given {packed.dtype}, {scales.dtype}, {code.dtype}"
        )
    if scales.numel() * BLOCK_SIZE != size_out * size_in or code.numel() != 16:
        raise ValueError(
            f"scales, code: need {size_out * size_in // BLOCK_SIZE} and 16 numbers, "
            f"given {scales.numel()} and {code.numel()}"
        )
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    inputs = 128 if size_in % 128 == 0 else 64
    num_splits = splits_of(size_in, size_out)
    steps = triton.cdiv(size_in // inputs, num_splits)
    sums = None if num_splits == 1 else x.new_empty(num_splits, num_rows, size_out, dtype=torch.float32)
    _multiply[(triton.cdiv(size_out, _OUTPUTS), num_splits)](
        x, packed, scales, code, bias, out, sums, num_rows, size_out, x.stride(0),
        SIZE_IN=size_in, SPLIT=steps * inputs, BLOCK=BLOCK_SIZE, INPUTS=inputs, OUTPUTS=_OUTPUTS,
        ROWS=max(16, triton.next_power_of_2(num_rows)), num_warps=4, num_stages=4,
    )  # fmt: skip
    if sums is not None:
        _add_up[(num_rows, triton.cdiv(size_out, 1024))](sums, bias, out, size_out, SPLITS=num_splits, OUTPUTS=1024)
    return out


def splits_of(size_in: int, size_out: int) -> int:
    """Return the number of parts that the inputs are split into: a power of two, at least 512 inputs each."""
    splits = 1
    while splits < _SPLITS_MAX and triton.cdiv(size_out, _OUTPUTS) * splits < _PROGRAMS and size_in >= splits * 1024:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, packed, scales, code, bias, out, sums, num_rows, size_out, x_row,
    SIZE_IN: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Compute `OUTPUTS` columns of the result over one split of the inputs, into `out` or `sums` [splits, M, O]."""
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    begin = tl.program_id(1) * SPLIT
    end = tl.minimum(begin + SPLIT, SIZE_IN)
    is_output, is_row = n < size_out, m < num_rows
    is_entry = is_output[:, None] & is_row[None, :]
    byte, block, input = tl.arange(0, INPUTS // 2), tl.arange(0, INPUTS // BLOCK), tl.arange(0, INPUTS)
    table = tl.broadcast_to(tl.load(code + tl.arange(0, 16))[None, :], [OUTPUTS, 16])
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for k in tl.range(begin, end, INPUTS):
        pair_at = n[:, None] * (SIZE_IN // 2) + (k // 2 + byte)[None, :]
        scale_at = n[:, None] * (SIZE_IN // BLOCK) + (k // BLOCK + block)[None, :]
        pair = tl.load(packed + pair_at, mask=is_output[:, None], other=0)
        scale = tl.load(scales + scale_at, mask=is_output[:, None], other=0.0)
        columns = tl.load(x + m[None, :] * x_row + (k + input)[:, None], mask=is_row[None, :], other=0.0)
        # Lanes exchange the values through gather; a load would copy to shared memory for each.
        first, second = tl.gather(table, (pair >> 4).to(tl.int32), 1), tl.gather(table, (pair & 15).to(tl.int32), 1)
        blocks = tl.join(first, second).reshape(OUTPUTS, INPUTS // BLOCK, BLOCK) * scale[:, :, None]
        weight = blocks.reshape(OUTPUTS, INPUTS).to(x.dtype.element_ty)
        acc = tl.dot(weight, columns, acc, input_precision="tf32x3")
    if sums is None:
        if bias is not None:
            acc += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
        tl.store(out + m[None, :] * size_out + n[:, None], acc.to(out.dtype.element_ty), mask=is_entry)
    else:
        tl.store(sums + (tl.program_id(1) * num_rows + m)[None, :] * size_out + n[:, None], acc, mask=is_entry)


@triton.jit
def _add_up(sums, bias, out, size_out, SPLITS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Add the splits of one row, first to last."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = n < size_out
    acc = tl.zeros([OUTPUTS], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(sums + (split * num_rows + row) * size_out + n, mask=is_output, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + row * size_out + n, acc.to(out.dtype.element_ty), mask=is_output)
