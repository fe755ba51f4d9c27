"""Gated adapter deltas of one site on the CPU, by the formula on which the whole system rests.

    out[t] = y[t] + sum over k of gate[t, k] * delta_k(x[t], y[t], r[t])

Shapes: T tokens in the batch, N entries, S slots, I in, O out. A row's bits depend on its own numbers alone: not on the
other rows, their adapters, the slot number of its adapter, T, or the number of threads.
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.cpu import library
from weft.kernels.step import Entries, shown

_ROW_DTYPES = (torch.float32, torch.bfloat16)
_pack = struct.Struct("=18q").pack  # WeftDeltas in deltas.cpp


class Packed(NamedTuple):
    """A step's entries, checked once, and their record for the kernels (WeftRows in deltas.cpp)."""

    entries: Entries
    num_rows: int
    numbers: tuple[int, ...]


def pack(entries: Entries) -> Packed:
    """Check the entries of a step on the CPU. Raises ValueError naming the argument that does not fit."""
    offsets, slots, gates = entries
    _check_vector("offsets", offsets, torch.int32)
    _check_vector("slots", slots, torch.int32)
    _check_vector("gates", gates, torch.float32)
    if len(offsets) < 1:
        raise ValueError("offsets: needs T + 1 elements, given 0")
    if len(slots) != len(gates):
        raise ValueError(f"gates: needs one for each of {len(slots)} slots, given {len(gates)}")
    pointers, num_rows = (offsets.data_ptr(), slots.data_ptr(), gates.data_ptr()), len(offsets) - 1
    return Packed(entries, num_rows, (*pointers, num_rows, len(slots)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One wrapped module and what each adapter slot does there. Made once; `table` may be rewritten between calls.

    table: [S, 4] int64, contiguous: kind, rank, address of A or l or b, address of B. By kind:
      LORA          A: [rank, I], B: [rank, O], row-major, of `weight_dtype`; B is transposed and includes the scaling
      SCALE_OUTPUT  l: [O] float32
      SCALE_INPUT   l: [I] float32
      BIAS          b: [O] float32
      BOTTLENECK…   A: [2 · rank, O] of `weight_dtype`, row-major: W_down, then W_up transposed, including its scaling;
                    the second address: float32, one after another: activation (0 ReLU, 1 GELU, 2 SiLU), whether there
                    is a LN (0 or 1), its eps, b_down [rank], b_up [O], and with a LN its gain [O] and bias [O]
      The table's owner keeps the weights alive and is responsible for their sizes; no code here can check an address.
    weight_dtype: float32 or bfloat16; of every A and B of the table.
    """

    table: Tensor
    size_in: int
    size_out: int
    weight_dtype: torch.dtype
    packed: tuple[int, ...] = field(init=False, repr=False, compare=False)  # its part of WeftDeltas in deltas.cpp

    def __post_init__(self) -> None:
        table = self.table
        is_right = table.dtype is torch.int64 and table.dim() == 2 and table.shape[1] == 4
        if not (is_right and table.is_cpu and table.is_contiguous()):
            raise ValueError(f"table: needs contiguous [S, 4] int64 on the CPU, given {shown(table)}")
        if self.weight_dtype not in _ROW_DTYPES:
            raise ValueError(f"weight_dtype: needs float32 or bfloat16, given {self.weight_dtype}")
        if self.size_in < 1 or self.size_out < 1:
            raise ValueError(f"size_in, size_out: need at least 1, given {self.size_in}, {self.size_out}")
        is_bf16 = self.weight_dtype is torch.bfloat16
        packed = self.size_in, self.size_out, int(is_bf16), table.data_ptr(), table.shape[0]
        object.__setattr__(self, "packed", packed)


def post(x: Tensor, y: Tensor, rows: Packed, site: Site, residual: Tensor | None = None) -> None:
    """Add the gated deltas of each row's adapters to its base output `y`, in place.

    Semantics: y[t] += sum over the entries n of row t of gates[n] * delta(x[t], y[t]), with A, B, l, b of slots[n]:
      LORA          delta = (x[t] @ A.T) @ B
      SCALE_OUTPUT  delta = (l - 1) * y[t]
      BIAS          delta = b
      BOTTLENECK    delta = f(y[t]), and by kind f(y[t] + r[t]), f(r[t]), LN(y[t] + f(y[t])) - y[t], where
                    f(z) = act(LN(z) @ W_down.T + b_down) @ W_up.T + b_up; in the last kind f has no LN
      any other kind adds nothing.
    Every delta reads `y` as it was passed. The sum is float32, rounded once; a row without effect keeps its bits.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    y: [T, O] or [1, T, O], of x's dtype, any row stride; written in place.
    residual: r, like y; needed if the rows' slots include a kind that reads it.
    """
    x_stride, is_bf16 = _check_rows("x", x, rows, site.size_in)
    y_stride, is_y_bf16 = _check_rows("y", y, rows, site.size_out)
    if is_bf16 is not is_y_bf16:
        raise ValueError(f"y: needs the dtype of x, {x.dtype}, given {y.dtype}")
    r = 0, 0
    if residual is not None:
        r_stride, is_r_bf16 = _check_rows("residual", residual, rows, site.size_out)
        if is_bf16 is not is_r_bf16:
            raise ValueError(f"residual: needs the dtype of x, {x.dtype}, given {residual.dtype}")
        r = residual.data_ptr(), r_stride
    _run("weft_post", x.data_ptr(), x_stride, y.data_ptr(), y_stride, is_bf16, rows, site, r)


def pre(x: Tensor, out: Tensor, rows: Packed, site: Site) -> None:
    """Write the input of the base weight: `x` with the gated input scales of each row's adapters.

    Semantics: out[t] = x[t] + sum over the entries n of row t of gates[n] * (l - 1) * x[t], with l of slots[n] if its
    kind is SCALE_INPUT; any other kind adds nothing. Summed in float32, rounded once; every row is written.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    out: like x, any row stride, sharing no memory with it; written in place.
    """
    x_stride, is_bf16 = _check_rows("x", x, rows, site.size_in)
    out_stride, is_out_bf16 = _check_rows("out", out, rows, site.size_in)
    if is_bf16 is not is_out_bf16:
        raise ValueError(f"out: needs the dtype of x, {x.dtype}, given {out.dtype}")
    if x.data_ptr() == out.data_ptr():
        raise ValueError("out: needs memory of its own, given x")
    _run("weft_pre", x.data_ptr(), x_stride, out.data_ptr(), out_stride, is_bf16, rows, site)


def _run(
    kernel: str,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    is_bf16: bool,
    rows: Packed,
    site: Site,
    residual: tuple[int, int] = (0, 0),
) -> None:
    threads = torch.get_num_threads()
    library.run(kernel, _pack(x, x_stride, y, y_stride, is_bf16, threads, *residual, *rows.numbers, *site.packed), site)


def _check_vector(name: str, given: Tensor, dtype: torch.dtype) -> None:
    if given.dim() != 1 or given.dtype is not dtype or not given.is_cpu or not given.is_contiguous():
        raise ValueError(f"{name}: needs a contiguous vector of {dtype} on the CPU, given {shown(given)}")


def _check_rows(name: str, given: Tensor, rows: Packed, size: int) -> tuple[int, bool]:
    """Return the row stride of `given`, and whether it is bfloat16, after checking it."""
    shape, strides, dtype = given.shape, given.stride(), given.dtype
    if shape != (rows.num_rows, size) and shape != (1, rows.num_rows, size):
        raise ValueError(f"{name}: needs [{rows.num_rows}, {size}], given {shown(given)}")
    if dtype not in _ROW_DTYPES or not given.is_cpu:
        raise ValueError(f"{name}: needs float32 or bfloat16 on the CPU, given {shown(given)}")
    if strides[-1] != 1 and size != 1:
        raise ValueError(f"{name}: needs a contiguous last dimension, given {shown(given)}")
    if given.requires_grad:
        raise ValueError(f"{name}: carries a gradient, which the kernels do not; train with the reference driver")
    return strides[-2], dtype is torch.bfloat16
