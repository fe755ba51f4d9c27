"""Gated adapter deltas of one site on the CPU: the line of the whole system, for a flattened batch.

    out[t] = y[t] + sum over k of gate[t, k] * delta_k(x[t], y[t])

Shapes: T tokens in the batch, N entries, S slots, I in, O out. A row's bits depend on its own numbers alone: not on the
other rows, their adapters, the slot number of its adapter, T, or the number of threads.
"""

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.kernels.cpu import library

_REASONS = {
    2: "offsets must begin at 0, never fall, and end at the number of entries",
    3: "a slot is outside the table",
}
_ACTIVATIONS = (torch.float32, torch.bfloat16)


class Kind(enum.IntEnum):
    """What an adapter does at a site; the first column of its table."""

    NOTHING = 0
    LORA = 1  # delta = B A x
    OUTPUT_SCALE = 2  # delta = (l - 1) * y
    INPUT_SCALE = 3  # `pre`: delta = (l - 1) * x
    BIAS = 4  # delta = b


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which adapters each row of the batch takes, and how much of each: row t has the entries offsets[t]:offsets[t + 1].

    offsets: [T + 1] int32, from 0 up to N.
    slots: [N] int32, each below the number of slots of every table it is used with.
    gates: [N] float32; an entry with gate 0 contributes nothing, whatever its weights hold.
    """

    offsets: Tensor
    slots: Tensor
    gates: Tensor
    arguments: tuple[int, int, int, int, int] = field(init=False, repr=False, compare=False)  # as the kernels take them

    def __post_init__(self) -> None:
        _check_list("offsets", self.offsets, torch.int32)
        _check_list("slots", self.slots, torch.int32)
        _check_list("gates", self.gates, torch.float32)
        if len(self.offsets) < 1:
            raise ValueError("offsets: needs T + 1 elements, given 0")
        if len(self.slots) != len(self.gates):
            raise ValueError(f"gates: needs one for each of {len(self.slots)} slots, given {len(self.gates)}")
        pointers = self.offsets.data_ptr(), self.slots.data_ptr(), self.gates.data_ptr()
        object.__setattr__(self, "arguments", (*pointers, len(self.offsets) - 1, len(self.slots)))


def post(x: Tensor, y: Tensor, rows: Rows, table: Tensor, *, weight_dtype: torch.dtype) -> None:
    """Add to each row of the base output `y` the gated deltas of its adapters, in place.

    Semantics: y[t] += sum over the entries n of row t of gates[n] * delta(x[t], y[t]), with slot s = slots[n]:
      LORA          delta = (x[t] @ A.T) @ B     A: [rank, I], B: [rank, O], the scaling already in B
      OUTPUT_SCALE  delta = (l - 1) * y[t]       l: [O]
      BIAS          delta = b                    b: [O]
      anything else adds nothing.
    Every delta sees `y` as it came; the sum is made in float32 and rounded once; a row without effect keeps its bits.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    y: [T, O] or [1, T, O], like x, any row stride; written in place.
    rows: the entries of the T rows.
    table: [S, 4] int64, contiguous: kind, rank, address of A or l or b, address of B. A and B are row-major of
      `weight_dtype`, l and b are float32; the caller keeps them alive and guarantees their sizes.
    weight_dtype: float32 or bfloat16; of every A and B of the table.
    """
    x_stride, num_rows, size_in = _check_rows("x", x)
    y_stride, y_rows, size_out = _check_rows("y", y)
    if y_rows != num_rows or y.dtype != x.dtype:
        raise ValueError(f"y: needs {num_rows} rows of {x.dtype} as x has, given {y_rows} of {y.dtype}")
    if weight_dtype not in _ACTIVATIONS:
        raise ValueError(f"weight_dtype: float32 or bfloat16, given {weight_dtype}")
    _check_table(rows, table, num_rows)
    if num_rows == 0:
        return
    _answer(
        library.functions().weft_post(
            x.data_ptr(), x_stride, y.data_ptr(), y_stride, size_in, size_out,
            x.dtype is torch.bfloat16, weight_dtype is torch.bfloat16,
            *rows.arguments, table.data_ptr(), len(table), torch.get_num_threads(),
        )
    )  # fmt: skip


def pre(x: Tensor, out: Tensor, rows: Rows, table: Tensor) -> None:
    """Write the input of the base weight: `x` with the gated input scales of each row's adapters.

    Semantics: out[t] = x[t] + sum over the entries n of row t of gates[n] * (l - 1) * x[t], with l: [I] of slot slots[n]
    where that slot's kind is INPUT_SCALE; other kinds add nothing. Summed in float32, rounded once; every row is written.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    out: the same shape and dtype, any row stride, sharing no memory with x; written in place.
    rows, table: as in `post`.
    """
    x_stride, num_rows, size_in = _check_rows("x", x)
    out_stride, out_rows, out_size = _check_rows("out", out)
    if (out_rows, out_size, out.dtype) != (num_rows, size_in, x.dtype):
        raise ValueError(f"out: needs [{num_rows}, {size_in}] {x.dtype} as x is, given {list(out.shape)} {out.dtype}")
    _check_table(rows, table, num_rows)
    if num_rows == 0:
        return
    _answer(
        library.functions().weft_pre(
            x.data_ptr(), x_stride, out.data_ptr(), out_stride, size_in, x.dtype is torch.bfloat16,
            *rows.arguments, table.data_ptr(), len(table), torch.get_num_threads(),
        )
    )  # fmt: skip


def _check_list(name: str, given: Tensor, dtype: torch.dtype) -> None:
    if given.dim() != 1 or given.dtype is not dtype or not given.is_cpu or not given.is_contiguous():
        raise ValueError(f"{name}: needs a contiguous CPU vector of {dtype}, given {given.dtype} {list(given.shape)}")


def _check_rows(name: str, given: Tensor) -> tuple[int, int, int]:
    """Row stride, number of rows, row length."""
    shape, strides = given.shape, given.stride()
    if not given.is_cpu or given.dtype not in _ACTIVATIONS:
        raise ValueError(f"{name}: needs float32 or bfloat16 on the CPU, given {given.dtype} on {given.device}")
    if len(shape) != 2 and (len(shape) != 3 or shape[0] != 1):
        raise ValueError(f"{name}: needs [T, size] or [1, T, size], given {list(shape)}")
    if shape[-1] < 1 or (strides[-1] != 1 and shape[-1] != 1):
        raise ValueError(f"{name}: needs a contiguous last dimension, given {list(shape)} with strides {strides}")
    if given.requires_grad:
        raise ValueError(f"{name}: no gradient flows through the kernels; use the reference driver to train")
    return strides[-2], shape[-2], shape[-1]


def _check_table(rows: Rows, table: Tensor, num_rows: int) -> None:
    if rows.arguments[3] != num_rows:
        raise ValueError(f"rows: needs entries for {num_rows} rows, given {rows.arguments[3]}")
    if table.dtype is not torch.int64 or table.dim() != 2 or table.shape[1] != 4 or not table.is_contiguous():
        raise ValueError(f"table: needs contiguous [S, 4] int64, given {table.dtype} {list(table.shape)}")


def _answer(status: int) -> None:
    if status == 1:
        raise MemoryError("the adapter kernel found no memory for its scratch")
    if status:
        raise ValueError(_REASONS[status])
