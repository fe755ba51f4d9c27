"""Device memory of adapters: which slot holds which adapter's weights.

A slot is storage, not mathematics: one contiguous buffer per adapter, of its own size, so nothing is padded to a
largest rank and bytes alone decide what fits. Kernels find weights through `table`, which has an entry for
each site and row; the reference driver gets views. An adapter that makes several kinds of delta at one site takes a
table row for each, and its slot has the number of the first. Only the engine thread calls this.
"""

import struct
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.adapters.packed_adapter import PackedAdapter
from weft.kernels.device import transfer_to
from weft.kernels.slot_tables import CaptureKey, SlotTables
from weft.methods.mixture import MixtureConfig, MixtureParams
from weft.methods.protocol import DeltaKind, Method, Packed

AdapterSlot = NewType("AdapterSlot", int)

_COLUMNS = 4  # kind, rank, address of the first tensor, address of the second
_ROUTER_COLUMNS = 8  # as in SlotTables.routers
_RANKS = 16
_CHOICES = 128
_NORMALIZE, _ABSOLUTE, _RMS_NORM = 1, 2, 4


@dataclass(slots=True)
class _Held:
    packed: PackedAdapter
    buffer: Tensor
    params: Mapping[str, Any] | None = None


class SlotTable(SlotTables):
    """Slots of one base, and the tables that kernels read.

    num_entries: by site, how many table rows act there.
    table_rows: the table rows of every slot that has more than one, its own number first.
    capacity_bytes: bounds the sum of the buffers. S grows as needed, at 32 bytes per site.
    """

    def __init__(self, *, num_sites: int, capacity_bytes: int, device: torch.device) -> None:
        table = torch.zeros(num_sites, 8, _COLUMNS, dtype=torch.int64)
        routers = torch.zeros(8, _ROUTER_COLUMNS, dtype=torch.int64)
        self._num_of_kind = [[0] * len(DeltaKind) for _ in range(num_sites)]
        self._kinds = array("H", bytes(2 * num_sites))
        self._ranks: Counter[int] = Counter()
        self._choices: Counter[int] = Counter()
        device_table = table.to(device, copy=True)
        super().__init__(
            table=table,
            device_table=device_table,
            routers=routers,
            device_routers=routers.to(device, copy=True),
            outputs_at={},
            inputs_at={},
            num_residual_readers=0,
            capture_key=self._key(device_table),
        )
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.num_entries = [0] * num_sites
        self.table_rows: dict[AdapterSlot, tuple[int, ...]] = {}
        self._transfer = transfer_to(device)
        self._held: dict[AdapterSlot, _Held] = {}
        self._free = list(reversed(range(8)))

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, number: object) -> bool:
        """Return whether a row of the table is a slot, and not a further row of an adapter with several."""
        return number in self._held

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def wait(self) -> None:
        """Order all later work on the device after the copies to every slot that was filled before."""
        self._transfer.wait()

    def put(self, packed: PackedAdapter) -> AdapterSlot | None:
        """Copy an adapter into a slot, readable after `wait`; return None if the budget has no room for it now."""
        if packed.buffer.nbytes > self.free_bytes:
            return None
        buffer = self._transfer.stage(packed.buffer)  # first, since it may find no memory
        while len(self._free) < packed.num_table_rows:
            self._grow()
        table_rows = tuple(self._free.pop() for _ in range(packed.num_table_rows))
        slot = AdapterSlot(table_rows[0])
        if len(table_rows) > 1:
            self.table_rows[slot] = table_rows
        self._held[slot] = _Held(packed, buffer)
        self.used_bytes += packed.buffer.nbytes
        start = buffer.data_ptr()
        self.outputs_at |= dict.fromkeys(table_rows, 0)
        self.inputs_at |= dict.fromkeys(table_rows, 0)
        for entry in packed.entries:
            at = self.inputs_at if entry.kind is DeltaKind.SCALE_INPUT else self.outputs_at
            at[table_rows[entry.table_row]] |= 1 << entry.site_index
            second = 0 if entry.second is None else start + entry.second.offset
            self.table[entry.site_index, table_rows[entry.table_row]] = torch.tensor(
                [entry.kind, entry.rank, start + entry.first.offset, second], dtype=torch.int64
            )
        if packed.router is not None:
            self.routers[slot] = torch.tensor(_router_row(packed.router.config, self.router(slot)[1]))
        self._mirror(table_rows)
        self._count(packed, 1)
        return slot

    def drop(self, slot: AdapterSlot) -> int:
        """Free a slot; return its bytes. The caller ensures that no running request uses it."""
        held = self._held.pop(slot)
        table_rows = self.table_rows.pop(slot, (slot,))
        for table_row in table_rows:
            del self.outputs_at[table_row], self.inputs_at[table_row]
            self.table[:, table_row] = DeltaKind.NONE
            self.routers[table_row] = 0
            self._free.append(table_row)
        self._mirror(table_rows)
        self.used_bytes -= held.packed.buffer.nbytes
        self._count(held.packed, -1)
        return held.packed.buffer.nbytes

    def method(self, slot: AdapterSlot) -> Method:
        return self._held[slot].packed.method

    def router(self, slot: AdapterSlot) -> tuple[MixtureConfig, MixtureParams]:
        """Return the router of a mixture's slot, as a view of device memory."""
        held = self._held[slot]
        assert held.packed.router is not None, slot
        return held.packed.router.config, MixtureParams(held.packed.router.weight.view(held.buffer))

    def params(self, slot: AdapterSlot) -> Mapping[str, Any]:
        """Return the slot's parameters by site name, as views of device memory, for the reference driver."""
        held = self._held[slot]
        if held.params is None:
            packed: dict[str, tuple[Packed, ...]] = {}
            for entry in held.packed.entries:  # those of a site come in the order of their table rows
                packed[entry.site_name] = (*packed.get(entry.site_name, ()), entry.packed(held.buffer))
            unpack = held.packed.method.unpack
            held.params = {} if unpack is None else {site: unpack(table_rows) for site, table_rows in packed.items()}
        return held.params

    def _key(self, device_table: Tensor) -> CaptureKey:
        rank = -(-max(self._ranks, default=0) // _RANKS) * _RANKS
        choices = max(_CHOICES, 1 << (max(self._choices, default=1) - 1).bit_length())
        return CaptureKey(device_table.data_ptr(), rank, self._kinds.tobytes(), choices)

    def _count(self, packed: PackedAdapter, step: int) -> None:
        self._ranks[max((entry.rank for entry in packed.entries), default=0)] += step
        self._ranks = +self._ranks
        if packed.router is not None:
            self._choices[packed.router.config.num_choices] += step
            self._choices = +self._choices
        for entry in packed.entries:
            counts = self._num_of_kind[entry.site_index]
            counts[entry.kind] += step
            if counts[entry.kind] == max(step, 0):  # the first has been added, or the last removed
                self._kinds[entry.site_index] ^= 1 << entry.kind
            self.num_entries[entry.site_index] += step
            if entry.kind.reads_residual:
                self.num_residual_readers += step
        self.capture_key = self._key(self.device_table)

    def _mirror(self, table_rows: Sequence[int]) -> None:
        """Bring the device's tables up to date, in order with the steps that read them."""
        for table_row in table_rows:
            self.device_table[:, table_row] = self.table[:, table_row].to(self.device_table.device)
            self.device_routers[table_row] = self.routers[table_row].to(self.device_routers.device)

    def _grow(self) -> None:
        capacity = len(self.routers)
        self.table, self.routers = (F.pad(table, (0, 0, 0, capacity)) for table in (self.table, self.routers))
        self.device_table = self.table.to(self.device_table.device, copy=True)
        self.device_routers = self.routers.to(self.device_routers.device, copy=True)
        self._free = [*reversed(range(capacity, 2 * capacity)), *self._free]


def _router_row(config: MixtureConfig, params: MixtureParams) -> list[int]:
    weight = params.weight
    flags = config.normalize * _NORMALIZE | config.absolute * _ABSOLUTE | config.rms_norm * _RMS_NORM
    (temperature,) = struct.unpack("<i", struct.pack("<f", config.temperature))
    stride = 0 if config.shared else weight.stride(0)
    sizes = weight.shape[2], config.num_experts, config.num_choices, config.top_k
    return [weight.data_ptr(), stride, *sizes, flags, temperature]
