"""A mixture's gates on the CPU: the mathematics of weft/methods/mixture.py for a flattened batch, in float32.

Shapes: T tokens in the batch, N entries, S slots, R runs. A row's bits depend on its own numbers alone.
"""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.kernels.cpu import library
from weft.kernels.step import Routing

_pack = struct.Struct("=21q").pack  # WeftRouting in routing.cpp
_ROW_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Destination of gates: row t has the entries offsets[t]:offsets[t + 1].

    offsets: int32 [T + 1]. experts: int32 [N]. values: float32 [N]. All on the CPU, contiguous; a step makes one of
        each and keeps it for its layers.
    """

    offsets: Tensor
    experts: Tensor
    values: Tensor
    packed: tuple[int, ...] = field(init=False, repr=False, compare=False)  # Target in routing.cpp

    def __post_init__(self) -> None:
        for name, given, dtype in (
            ("offsets", self.offsets, torch.int32),
            ("experts", self.experts, torch.int32),
            ("values", self.values, torch.float32),
        ):
            if given.dim() != 1 or given.dtype is not dtype or not given.is_cpu or not given.is_contiguous():
                raise ValueError(f"{name}: needs a contiguous vector of {dtype} on the CPU, given {given.dtype}")
        if len(self.experts) != len(self.values):
            raise ValueError(f"values: needs one for each of {len(self.experts)} entries, given {len(self.values)}")
        pointers = self.offsets.data_ptr(), self.experts.data_ptr(), self.values.data_ptr()
        object.__setattr__(self, "packed", (*pointers, len(self.values)))


NOWHERE = (0, 0, 0, 0)  # a target without values


def route(
    hidden: Tensor, layer: int, routers: Tensor, routing: Routing, gates: Target, log_gates: Target | None = None
) -> None:
    """Write the gates of the routed rows for one layer, from the rows `hidden` that enter it.

    hidden: [T, H] or [1, T, H], float32 or bfloat16, any row stride.
    routers: int64 [S, 8] (SlotTables.routers). gates: takes the gates themselves; log_gates: their logarithms.
    """
    rows = hidden.shape[-2]
    if hidden.dtype not in _ROW_DTYPES or not hidden.is_cpu or hidden.stride(-1) != 1:
        raise ValueError(f"hidden: needs contiguous float32 or bfloat16 on the CPU, given {hidden.dtype}")
    if hidden.dim() > 2 and hidden.shape[0] != 1:
        raise ValueError(f"hidden: needs [T, H] or [1, T, H], given {list(hidden.shape)}")
    for target in (gates, log_gates):
        if target is not None and len(target.offsets) != rows + 1:
            raise ValueError(f"offsets: needs {rows + 1} elements, given {len(target.offsets)}")
    table, trace = routing.table, routing.trace
    traced = (0, 0) if trace is None else (trace.data_ptr() + layer * trace.stride(0) * 4, trace.shape[1])
    is_bf16 = hidden.dtype is torch.bfloat16
    library.run(
        "weft_route",
        _pack(
            *(hidden.data_ptr(), hidden.stride(-2), is_bf16, hidden.shape[-1], rows, layer, torch.get_num_threads()),
            *(routers.data_ptr(), len(routers), table.data_ptr(), len(table), *traced),
            *gates.packed,
            *(NOWHERE if log_gates is None else log_gates.packed),
        ),
        routers,
    )
