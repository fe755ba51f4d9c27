"""Gated adapter deltas of one site on CUDA: the semantics of kernels/cpu/deltas.py, in Triton.

    out[t] = y[t] + sum over k of gate[t, k] * delta_k(x[t], y[t], r[t])

Shapes: T rows in the batch, N entries, S slots, I in, O out; G sites of a group that read one input, whose outputs lie
side by side in a row of y. Nothing here reads the device: launches depend on shapes and on what the site declares about
its slots, so a step can be captured in a CUDA graph. For that reason no number on the device is checked; the code that
makes the rows is responsible for them.

A group with LoRAs, of any ranks and however many, takes two launches (shrink, expand). Scales and biases alone take one
(expand). Bottleneck adapters take two more (fill, and a shrink of their own), the normed kind a third (finish).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from weft.kernels.cuda import lone_rows, networks, tiles
from weft.kernels.cuda.call import GROUP_MAX, RANKS, Call, num_parts_of
from weft.kernels.step import Entries, row_of_entry, shown
from weft.methods.protocol import DeltaKind

ROW_DTYPES = (torch.float32, torch.bfloat16)
_ENTRY_DTYPES = (torch.int32, torch.int32, torch.float32)
_WEIGHTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# The L2 cache supplies an adapter's weights to every row but the first. Up to this many rows that costs less than
# tiles, which take their slots one after another; in decode every row may have its own slot.
LONE_ROWS_MAX = 256

_NETWORKS = tuple(kind for kind in DeltaKind if kind >= DeltaKind.BOTTLENECK)
ALONE = (DeltaKind.SCALE_INPUT, *_NETWORKS)
_WITH_HIDDEN = (DeltaKind.LORA, *_NETWORKS)


class Rows(NamedTuple):
    """A step's entries on the device, checked once. rows_of: int32 [N], the row of each entry, T if it has none."""

    entries: Entries
    rows_of: Tensor

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.entries.offsets) - 1

    @property
    def num_entries(self) -> int:
        """N."""
        return len(self.entries.slots)


def rows_of(entries: Entries) -> Rows:
    """Check the entries, whose gates may change between calls. Raises ValueError naming the argument that is wrong."""
    offsets, slots, gates = entries
    for (name, given), dtype in zip(entries._asdict().items(), _ENTRY_DTYPES, strict=True):
        if given.dim() != 1 or given.dtype is not dtype or not given.is_contiguous():
            raise ValueError(f"{name}: needs a contiguous vector of {dtype}, given {shown(given)}")
        if given.device != offsets.device:
            raise ValueError(f"{name}: needs the device of offsets, {offsets.device}, given {given.device}")
    if len(offsets) < 1:
        raise ValueError("offsets: needs T + 1 elements, given 0")
    if len(slots) != len(gates):
        raise ValueError(f"gates: needs one for each of {len(slots)} slots, given {len(gates)}")
    return Rows(entries, row_of_entry(entries))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A wrapped module, or a group of up to three that read one input, and what each adapter slot does there.

    table: [G, S, 4] int64 on the device, contiguous; its columns are those of kernels/cpu/deltas.py. It may be
        rewritten between calls, within `kinds` and `rank`. Its owner keeps the weights alive, aligned to 16 bytes.
    sizes_out: of each module; O is their sum.
    weight_dtype: float32 or bfloat16; of every A and B of the table.
    kinds: all kinds in the table, and perhaps more; they decide which kernels run. Bit k is for kind k. Networks and
        scales of inputs are only for a single module.
    rank: at least the rank of every slot.
    """

    table: Tensor
    size_in: int
    sizes_out: tuple[int, ...]
    weight_dtype: torch.dtype
    kinds: int
    rank: int

    def __post_init__(self) -> None:
        table = self.table
        if table.dtype is not torch.int64 or table.dim() != 3 or table.shape[2] != 4 or not table.is_contiguous():
            raise ValueError(f"table: needs contiguous [G, S, 4] int64, given {shown(table)}")
        if not len(self.sizes_out) == len(table) <= GROUP_MAX:
            raise ValueError(
                f"sizes_out: needs one for each of {len(table)} sites, up to {GROUP_MAX}, given {self.sizes_out}"
            )
        if self.weight_dtype not in _WEIGHTS:
            raise ValueError(f"weight_dtype: needs float32 or bfloat16, given {self.weight_dtype}")
        if self.size_in < 1 or min(self.sizes_out) < 1:
            raise ValueError(f"size_in, sizes_out: need at least 1, given {self.size_in}, {self.sizes_out}")
        if len(table) > 1 and self.has(*ALONE):
            raise ValueError(f"kinds: networks and scales of inputs need a site of their own, given {self.kinds:b}")
        if self.rank < 1 and self.has(*_WITH_HIDDEN):
            raise ValueError(f"rank: needs at least 1 where LoRAs or networks are, given {self.rank}")

    @property
    def size_out(self) -> int:
        """O."""
        return sum(self.sizes_out)

    def has(self, *kinds: DeltaKind) -> bool:
        """Return whether a slot may have one of these kinds."""
        return any(self.kinds >> kind & 1 for kind in kinds)


def post(x: Tensor, y: Tensor, rows: Rows, site: Site, residual: Tensor | None = None) -> None:
    """Add the gated deltas of each row's adapters to its base output `y`, in place.

    Semantics: kernels/cpu/deltas.py::post. Among up to `LONE_ROWS_MAX` rows, a row's bits depend on its own numbers
    alone; among more, also on its place in the batch, but never on what neighbours hold.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    y: [T, O] or [1, T, O], of x's dtype, any row stride; written in place.
    residual: r, like y; needed if the site has a kind that reads it.
    """
    x = _rows("x", x, rows, site.size_in, x.dtype)
    y = _rows("y", y, rows, site.size_out, x.dtype)
    if residual is not None:
        residual = _rows("residual", residual, rows, site.size_out, x.dtype)
    elif site.has(DeltaKind.BOTTLENECK_SUM, DeltaKind.BOTTLENECK_RESIDUAL):
        raise ValueError("residual: needs one, since the site has kinds that read it, given none")
    if not rows.num_entries or not rows.num_rows:
        return
    call = _call(rows, site)
    kernels = lone_rows if rows.num_rows <= LONE_ROWS_MAX else tiles
    if site.has(DeltaKind.LORA):
        kernels.shrink(call, x, of_networks=False)
    if site.has(*_NETWORKS):
        networks.fill(call, y, y if residual is None else residual)
        kernels.shrink(call, call.z, of_networks=True)
        if site.has(DeltaKind.BOTTLENECK_NORMED):
            networks.finish(call, y)
    kernels.expand(call, y)


def pre(x: Tensor, out: Tensor, rows: Rows, site: Site) -> None:
    """Write the input of the base weight: `x` with the gated input scales of each row's adapters.

    Semantics: kernels/cpu/deltas.py::pre. Every row is written.

    x: [T, I] or [1, T, I], float32 or bfloat16, any row stride.
    out: like x, any row stride, sharing no memory with it; written in place.
    """
    x = _rows("x", x, rows, site.size_in, x.dtype)
    out = _rows("out", out, rows, site.size_in, x.dtype)
    if x.data_ptr() == out.data_ptr() and rows.num_rows:
        raise ValueError("out: needs memory of its own, given x")
    if rows.num_rows:
        lone_rows.scale_inputs(x, out, *rows.entries, site.table)


def _call(rows: Rows, site: Site) -> Call:
    """Return a call with new scratch memory, which PyTorch's allocator keeps in order with the stream's work."""
    device, num_entries = rows.entries.offsets.device, rows.num_entries
    width = -(-site.rank // RANKS) * RANKS if site.has(*_WITH_HIDDEN) else RANKS
    num_parts = num_parts_of(max(site.size_in, site.size_out) if site.has(*_NETWORKS) else site.size_in)
    hidden = num_parts, len(site.table), num_entries, width
    z = (num_entries, site.size_out) if site.has(*_NETWORKS) else (0, site.size_out)
    return Call(
        rows_of=rows.rows_of,
        entries=rows.entries,
        table=site.table,
        hidden=torch.empty(hidden, dtype=torch.float32, device=device),
        z=torch.empty(z, dtype=torch.float32, device=device),
        sizes_out=site.sizes_out,
        weight=_WEIGHTS[site.weight_dtype],
    )


def _rows(name: str, given: Tensor, rows: Rows, size: int, dtype: torch.dtype) -> Tensor:
    """Return `given` as [T, size], after checking it."""
    shape = rows.num_rows, size
    if given.shape != shape and given.shape != (1, *shape):
        raise ValueError(f"{name}: needs {list(shape)}, given {shown(given)}")
    if given.dtype is not dtype:
        raise ValueError(f"{name}: needs the dtype of x, {dtype}, given {given.dtype}")
    device = rows.entries.offsets.device
    if dtype not in ROW_DTYPES or given.device != device:
        raise ValueError(f"{name}: needs float32 or bfloat16 on {device}, given {shown(given)}")
    if given.stride(-1) != 1 and size != 1:
        raise ValueError(f"{name}: needs a contiguous last dimension, given {shown(given)}")
    if given.requires_grad:
        raise ValueError(f"{name}: carries a gradient, which the kernels do not; train with the reference driver")
    return given[0] if given.dim() == 3 else given
