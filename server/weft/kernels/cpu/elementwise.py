"""Element-wise parts of a decoder layer on the CPU: RMS norms, and the gate of an MLP.

Each is one pass over a row in float32, rounded once. torch takes six operations for a norm and two for a gate, and
writes a tensor after each. Shapes: T rows, F features.
"""

import struct

import torch
from torch import Tensor

from weft.kernels.cpu import library

_pack_norm = struct.Struct("=8qd").pack  # WeftNorm in elementwise.cpp
_pack_gate = struct.Struct("=10q").pack  # WeftGate
_DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x · gain / √(mean(x²) + eps) (Zhang & Sennrich 2019), over the last dimension.

    x: [..., F], float32 or bfloat16. gain: [F] float32, contiguous.
    """
    rows, stride = _rows("x", x)
    if gain.shape != (x.shape[-1],) or gain.dtype is not torch.float32 or not gain.is_contiguous():
        raise ValueError(f"gain: needs contiguous [{x.shape[-1]}] float32, given {gain.dtype} {list(gain.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype)
    library.run(
        "weft_rms_norm",
        _pack_norm(
            rows.data_ptr(), stride, out.data_ptr(), rows.shape[0], rows.shape[1], x.dtype is torch.bfloat16,
            torch.get_num_threads(), gain.data_ptr(), eps,
        ),
        gain,
    )  # fmt: skip
    return out


def gate(given: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(given) · up (Shazeer 2020, GLU variants), both [..., F] of one dtype, float32 or bfloat16.

    activation: "silu", or "gelu_tanh" (the tanh form of GELU).
    """
    rows, stride = _rows("given", given)
    up_rows, up_stride = _rows("up", up)
    if given.shape != up.shape or given.dtype is not up.dtype:
        raise ValueError(f"up: needs {given.dtype} {list(given.shape)}, given {up.dtype} {list(up.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: needs one of {', '.join(ACTIVATIONS)}, given {activation}")
    out = torch.empty(given.shape, dtype=given.dtype)
    library.run(
        "weft_gate",
        _pack_gate(
            rows.data_ptr(), stride, up_rows.data_ptr(), up_stride, out.data_ptr(), rows.shape[0], rows.shape[1],
            given.dtype is torch.bfloat16, torch.get_num_threads(), ACTIVATIONS.index(activation),
        )
    )  # fmt: skip
    return out


def _rows(name: str, x: Tensor) -> tuple[Tensor, int]:
    """Return `x` as rows [T, F], and their stride."""
    if x.dtype not in _DTYPES or not x.is_cpu:
        raise ValueError(f"{name}: needs float32 or bfloat16 on the CPU, given {x.dtype} on {x.device}")
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
