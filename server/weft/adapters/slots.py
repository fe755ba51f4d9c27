"""Device memory of adapters: which slot holds whose weights.

A slot is storage, not mathematics: one contiguous buffer per adapter, of its own size, so nothing is padded to a
largest rank and bytes alone decide what fits. Kernels find a slot's weights through `table`, one row per site and slot;
the reference driver gets views. Only the engine thread calls this.
"""

from collections.abc import Mapping
from typing import Any, NewType

import torch
from torch import Tensor

from weft.adapters.slab import Slab
from weft.methods.protocol import DeltaKind, Method

AdapterSlot = NewType("AdapterSlot", int)

_COLUMNS = 4  # kind, rank, address of the first tensor, address of the second


class _Held:
    __slots__ = ("buffer", "method", "params", "slab")

    def __init__(self, slab: Slab, buffer: Tensor) -> None:
        self.slab = slab
        self.buffer = buffer
        self.method = slab.method
        self.params: Mapping[str, Any] | None = None


class SlotTable:
    """Slots of one base.

    table: int64 [num_sites, S, 4], the kernels' view: (kind, rank, address, address) of every slot at every site.
    num_entries, num_input_scales: by site, how many slots do anything there, and how many of them to its input.
    capacity_bytes bounds the sum of the buffers; S grows as needed and costs 32 bytes a site.
    """

    def __init__(self, *, num_sites: int, capacity_bytes: int, device: torch.device) -> None:
        self.table = torch.zeros(num_sites, 8, _COLUMNS, dtype=torch.int64)
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._device = device
        self._held: dict[AdapterSlot, _Held] = {}
        self._free = list(reversed(range(8)))
        self.num_entries = [0] * num_sites
        self.num_input_scales = [0] * num_sites

    def __len__(self) -> int:
        return len(self._held)

    @property
    def free_bytes(self) -> int:
        """What the budget has left."""
        return self.capacity_bytes - self.used_bytes

    def put(self, slab: Slab) -> AdapterSlot | None:
        """Copy an adapter into a slot; None where the budget has no room for it now."""
        if slab.buffer.nbytes > self.free_bytes:
            return None
        if not self._free:
            self._grow()
        slot = AdapterSlot(self._free.pop())
        buffer = slab.buffer.to(self._device, non_blocking=True)  # on a CPU host and device share the bytes
        self._held[slot] = _Held(slab, buffer)
        self.used_bytes += slab.buffer.nbytes
        start = buffer.data_ptr()
        for entry in slab.entries:
            second = 0 if entry.second is None else start + entry.second.offset
            self.table[entry.site_index, slot] = torch.tensor(
                [entry.kind, entry.rank, start + entry.first.offset, second], dtype=torch.int64
            )
        self._count(slab, 1)
        return slot

    def drop(self, slot: AdapterSlot) -> int:
        """Free a slot; returns its bytes. The caller knows that no running request uses it."""
        held = self._held.pop(slot)
        self.table[:, slot] = DeltaKind.NONE
        self._free.append(slot)
        self.used_bytes -= held.slab.buffer.nbytes
        self._count(held.slab, -1)
        return held.slab.buffer.nbytes

    def method(self, slot: AdapterSlot) -> Method:
        """The method whose parameters the slot holds."""
        return self._held[slot].method

    def params(self, slot: AdapterSlot) -> Mapping[str, Any]:
        """The slot's parameters by site name, as views of device memory: what the reference driver reads."""
        held = self._held[slot]
        if held.params is None:
            unpack = held.method.unpack
            held.params = (
                {}
                if unpack is None
                else {entry.site_name: unpack(entry.packed(held.buffer)) for entry in held.slab.entries}
            )
        return held.params

    def _count(self, slab: Slab, step: int) -> None:
        for entry in slab.entries:
            self.num_entries[entry.site_index] += step
            if entry.kind is DeltaKind.SCALE_INPUT:
                self.num_input_scales[entry.site_index] += step

    def _grow(self) -> None:
        num_sites, capacity, _ = self.table.shape
        grown = torch.zeros(num_sites, 2 * capacity, _COLUMNS, dtype=torch.int64)
        grown[:, :capacity] = self.table
        self.table = grown
        self._free = list(reversed(range(capacity, 2 * capacity)))
