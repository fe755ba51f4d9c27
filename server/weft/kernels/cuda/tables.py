"""Reads that delta kernels share: a slot's line in a site's table, hidden vectors, products with narrow weights.

Addresses come from the table, so a compiler cannot infer their alignment. Packed adapters align their contents to 64
bytes (adapters/packed_adapter.py), and kernels declare it to get wide loads.
"""

# Kernels are Triton, which only looks like Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from weft.methods.protocol import DeltaKind

LORA = tl.constexpr(int(DeltaKind.LORA))
SCALE_OUTPUT = tl.constexpr(int(DeltaKind.SCALE_OUTPUT))
SCALE_INPUT = tl.constexpr(int(DeltaKind.SCALE_INPUT))
BIAS = tl.constexpr(int(DeltaKind.BIAS))
BOTTLENECK = tl.constexpr(int(DeltaKind.BOTTLENECK))  # it and every later kind is a bottleneck adapter
BOTTLENECK_SUM = tl.constexpr(int(DeltaKind.BOTTLENECK_SUM))
BOTTLENECK_RESIDUAL = tl.constexpr(int(DeltaKind.BOTTLENECK_RESIDUAL))
BOTTLENECK_NORMED = tl.constexpr(int(DeltaKind.BOTTLENECK_NORMED))

# Arguments that change every step; Triton must not specialize on them.
BY_STEP = ("offsets", "rows_of", "slots", "gates", "num_rows", "num_entries")

_GELU = tl.constexpr(1)
_SILU = tl.constexpr(2)
_HEADER = tl.constexpr(3)  # activation, whether there is a LN, its eps


@triton.jit
def line_of(table, slot):
    """Return a slot's kind, rank and two addresses."""
    at = table + slot.to(tl.int64) * 4
    return tl.load(at), tl.load(at + 1).to(tl.int32), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def output_block(block, size_0, size_1, size_2, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Locate a block of a group's outputs. No block has outputs of two sites.

    Returns its site, where that site's outputs begin, how many it has, and how many of them come before the block.
    """
    site, begin, size, before = 0, 0, size_0, block * BLOCK
    if GROUP > 1:
        is_later = block >= tl.cdiv(size_0, BLOCK)
        site = tl.where(is_later, 1, 0)
        begin = tl.where(is_later, size_0, 0)
        size = tl.where(is_later, size_1, size_0)
        before -= tl.where(is_later, tl.cdiv(size_0, BLOCK) * BLOCK, 0)
    if GROUP > 2:
        is_last = block >= tl.cdiv(size_0, BLOCK) + tl.cdiv(size_1, BLOCK)
        site = tl.where(is_last, 2, site)
        begin = tl.where(is_last, size_0 + size_1, begin)
        size = tl.where(is_last, size_2, size)
        before -= tl.where(is_last, tl.cdiv(size_1, BLOCK) * BLOCK, 0)
    return site, begin, size, before


@triton.jit
def products_at(hidden, part, site, n, num_entries, width, GROUP: tl.constexpr):
    """Return where the products A x of entries `n` begin, for one site and one part of the inputs."""
    return hidden + ((part * GROUP + site) * num_entries + n).to(tl.int64) * width


@triton.jit
def matrix_at(address, DTYPE: tl.constexpr):
    """Return a pointer to the beginning of a packed adapter's contents."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def expansion_of(kind, rank, a, b, size_out, WEIGHT: tl.constexpr):
    """Return where B [rank, O] of a LoRA begins, or W_up [rank, O] of a bottleneck, which follows its W_down."""
    up = a + rank.to(tl.int64) * size_out * (WEIGHT.primitive_bitwidth // 8)
    return matrix_at(tl.where(kind == LORA, b, up), WEIGHT)


@triton.jit
def down_bias_of(b):
    """Return a pointer to b_down [rank] of a bottleneck's vectors; b_up [O] and the LN's gain and bias follow it."""
    return b.to(tl.pointer_type(tl.float32)) + _HEADER


@triton.jit
def norm_of(b):
    """Return whether a bottleneck has a LN, and its eps."""
    vectors = b.to(tl.pointer_type(tl.float32))
    return tl.load(vectors + 1) != 0.0, tl.load(vectors + 2)


@triton.jit
def activate(b, v):
    """Return σ(v) of the bottleneck whose vectors are at `b`."""
    activation = tl.load(b.to(tl.pointer_type(tl.float32))).to(tl.int32)
    result = tl.where(v < 0.0, 0.0, v)  # keeps a NaN
    result = tl.where(activation == _GELU, 0.5 * v * (1.0 + tl.erf(v * 0.70710678118654752)), result)
    return tl.where(activation == _SILU, v / (1.0 + tl.exp(-v)), result)


@triton.jit
def add_product(total, left, right):
    """Return total + left @ right, left float32, right float32 or bfloat16; as exact as float32.

    Three bfloat16 hold all 24 bits of a float32, so three products on tensor cores equal its product, in a fraction of
    the time that one in float32 takes.
    """
    if right.dtype == tl.bfloat16:
        high = left.to(tl.bfloat16)
        rest = left - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, right, total)
        total = tl.dot(middle, right, total)
        return tl.dot(high, right, total)
    else:
        return tl.dot(left, right, total, input_precision="ieee")
