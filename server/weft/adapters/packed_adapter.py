"""Pack an adapter for slots: into a single flat buffer, so that loading it takes a single copy.

Host memory and device slots have the same layout. Vectors stay float32 and matrices take the slots' dtype (each
method's `pack` decides), so the buffer is bytes and each part is a typed view of it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.device import Part
from weft.methods import mixture
from weft.methods.mixture import Mixture, MixtureConfig
from weft.methods.protocol import Adapter, BaseShape, DeltaKind, Method, Packed, Virtual

_ALIGNMENT = 64  # bytes: a cache line, and a good alignment for vector loads


class PackedDelta(NamedTuple):
    """One kind of delta at one site. If the adapter has several kinds there, each has its own table row."""

    site_index: int
    site_name: str
    table_row: int
    kind: DeltaKind
    rank: int
    first: Part
    second: Part | None

    def packed(self, buffer: Tensor) -> Packed:
        """Return the entry's tensors as views of `buffer`."""
        second = None if self.second is None else self.second.view(buffer)
        return Packed(self.kind, self.rank, self.first.view(buffer), second)


class RouterEntry(NamedTuple):
    """A mixture's router; `weight` is float32 [1 or L, choices, hidden]."""

    config: MixtureConfig
    weight: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """An adapter ready for a slot. `virtual` has the base's dtype, which is also that of the KV cache."""

    method: Method
    buffer: Tensor  # uint8 [bytes], on the host
    entries: tuple[PackedDelta, ...]
    virtual: Virtual | None
    kv_bytes: int  # of its virtual positions in the KV cache, not rounded up to whole blocks
    router: RouterEntry | None = None

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.virtual is None else self.virtual.num_positions

    @property
    def num_table_rows(self) -> int:
        """Rows of the slot table that the adapter takes."""
        return 1 + max((entry.table_row for entry in self.entries), default=0)

    @property
    def size_bytes(self) -> int:
        """Host bytes, virtual positions included."""
        virtual = 0 if self.virtual is None else sum(t.nbytes for t in self.virtual)
        return self.buffer.nbytes + virtual


def build(adapter: Adapter, base: BaseShape, *, dtype: torch.dtype, pinned: bool = False) -> PackedAdapter:
    """Pack `adapter` for slots of `dtype`. pinned: into memory that a CUDA device can copy from by itself."""
    placed: list[tuple[Part, Tensor]] = []
    entries: list[PackedDelta] = []
    offset = 0

    def place(tensor: Tensor) -> Part:
        nonlocal offset
        part = Part(offset, tuple(tensor.shape), tensor.dtype)
        placed.append((part, tensor))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return part

    for name in sorted(adapter.sites, key=lambda name: base.sites[name].index):
        assert adapter.method.pack is not None
        for table_row, packed in enumerate(adapter.method.pack(adapter.sites[name], dtype)):
            first = place(packed.first)
            second = None if packed.second is None else place(packed.second)
            entries.append(
                PackedDelta(base.sites[name].index, name, table_row, packed.kind, packed.rank, first, second)
            )
    buffer = torch.zeros(offset, dtype=torch.uint8, pin_memory=pinned)
    for part, tensor in placed:
        part.view(buffer).copy_(tensor)
    virtual, kv_bytes = None, 0
    if adapter.method.virtual is not None:
        given = adapter.method.virtual(adapter.prefix)
        virtual = type(given)(*(tensor.to(dtype).contiguous() for tensor in given))
        per_position = 2 * base.num_layers * base.num_kv_heads * base.head_dim * dtype.itemsize
        kv_bytes = virtual.num_positions * per_position
    return PackedAdapter(
        method=adapter.method, buffer=buffer, entries=tuple(entries), virtual=virtual, kv_bytes=kv_bytes
    )


def build_router(given: Mixture, *, pinned: bool = False) -> PackedAdapter:
    """Pack a mixture's router, which stays float32 whatever the slots' dtype. pinned: as in `build`."""
    weight = given.params.weight.float().contiguous()
    part = Part(0, tuple(weight.shape), weight.dtype)
    buffer = torch.zeros(-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    part.view(buffer).copy_(weight)
    router = RouterEntry(given.config, part)
    return PackedAdapter(method=mixture.METHOD, buffer=buffer, entries=(), virtual=None, kv_bytes=0, router=router)
