"""The product of a linear module on a CPU that multiplies pairs of bfloat16 (AVX512-BF16), its weight laid out once.

Shapes: T rows, I inputs, O outputs. A row's bits depend on its own numbers and on I alone: not on T, its place among
the rows, or the number of threads. Subnormal inputs count as zeros, as in the processor's instruction.
"""

import contextlib
import mmap
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.cpu import library
from weft.kernels.step import shown

_pack = struct.Struct("=9q").pack  # WeftLinear in gemm.cpp
_LANES, _BLOCKS, _CHUNK = 16, 4, 512  # gemm.cpp
_GROUP = _LANES * _BLOCKS
_HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Weight:
    """W [O, I] in the order of its use; gemm.cpp has the layout."""

    data: Tensor  # [O in groups of 64, I in pairs, as one vector] int32, each a pair of inputs
    size_in: int
    size_out: int


def available() -> bool:
    """Return whether `linear` can run here: the kernels are compiled, for a processor with the instruction."""
    return library.available() and library.functions().weft_linear(None) == 0


def pack(weight: Tensor) -> Weight:
    """Lay out a weight [O, I] bfloat16, in new memory; incomplete groups and pairs are padded with zeros."""
    if weight.dim() != 2 or weight.dtype is not torch.bfloat16 or not weight.is_cpu or 0 in weight.shape:
        raise ValueError(f"weight: needs [O, I] bfloat16 on the CPU, given {shown(weight)}")
    size_out, size_in = weight.shape
    groups, pairs = -(-size_out // _GROUP), -(-size_in // 2)
    whole = weight.detach().contiguous()
    if whole.shape != (groups * _GROUP, 2 * pairs) or whole.storage_offset() % 2:  # then it cannot be viewed as pairs
        whole = torch.zeros(groups * _GROUP, 2 * pairs, dtype=torch.bfloat16)
        whole[:size_out, :size_in] = weight.detach()
    packed = Weight(_memory(groups * _GROUP * pairs), size_in, size_out)
    for here, there in _chunks(packed, whole):
        here.copy_(there)
    return packed


def unpack(weight: Weight) -> Tensor:
    """Return the original weight [O, I], in new memory."""
    groups, pairs = -(-weight.size_out // _GROUP), -(-weight.size_in // 2)
    whole = torch.empty(groups * _GROUP, 2 * pairs, dtype=torch.bfloat16)
    for here, there in _chunks(weight, whole):
        there.copy_(here)
    return whole[: weight.size_out, : weight.size_in].contiguous()


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias: [..., O] bfloat16, summed in float32 and rounded once.

    x: [..., I] bfloat16, any row stride. bias: [O] bfloat16, contiguous.
    """
    if x.dtype is not torch.bfloat16 or not x.is_cpu or x.shape[-1] != weight.size_in:
        raise ValueError(f"x: needs [..., {weight.size_in}] bfloat16 on the CPU, given {shown(x)}")
    if bias is not None and (
        bias.shape != (weight.size_out,) or bias.dtype is not torch.bfloat16 or not bias.is_contiguous()
    ):
        raise ValueError(f"bias: needs contiguous [{weight.size_out}] bfloat16, given {shown(bias)}")
    if x.requires_grad:
        raise ValueError("x: carries a gradient, which the kernels do not; train with the base as it was loaded")
    rows, stride = (x, weight.size_in) if x.is_contiguous() else _rows(x)
    y = x.new_empty((*x.shape[:-1], weight.size_out))
    library.run(
        "weft_linear",
        _pack(
            rows.data_ptr(), stride, weight.data.data_ptr(), 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), x.numel() // weight.size_in, weight.size_in, weight.size_out, torch.get_num_threads(),
        ),
        weight,
        bias,
    )  # fmt: skip
    return y


def _memory(num_pairs: int) -> Tensor:
    """Return an int32 vector, on huge pages if available: a stream of weights leaves a small page every 64 lines."""
    num_bytes = 4 * num_pairs
    pages = mmap.mmap(-1, num_bytes + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(pages, dtype=torch.int32)  # keeps the pages; untouched ones take no memory
    begin = -whole.data_ptr() % _HUGE_PAGE
    num_huge = round(num_bytes / _HUGE_PAGE)  # the last one only if half of it is needed
    if num_huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE, begin, num_huge * _HUGE_PAGE)
    return whole[begin // 4 : begin // 4 + num_pairs]


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` as [T, I], a row's elements side by side, and the stride of rows."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _chunks(packed: Weight, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views of the same elements of layout and `whole` [O, I], both padded: [group, block, pair, 16] a chunk."""
    pairs = whole.shape[1] // 2
    groups = packed.data.view(-1, pairs * _GROUP)
    views = []
    for first in range(0, pairs, _CHUNK):
        size = min(_CHUNK, pairs - first)
        here = groups[:, first * _GROUP : (first + size) * _GROUP].unflatten(1, (_BLOCKS, size, _LANES))
        there = whole.view(torch.int32)[:, first : first + size].unflatten(0, (-1, _BLOCKS, _LANES))
        views.append((here, there.transpose(-1, -2)))
    return views
