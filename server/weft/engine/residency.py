"""Residency of adapters on the device, and what keeps them there. Called only on the engine thread.

An adapter is resident when its slot is filled and its virtual positions are in the KV pool. A request holds its
adapters from the step that starts it to its end. Held and pinned adapters stay; the others are evicted when room is
needed, the longest unused first. A missing adapter is wanted once (`take_wanted`) and arrives as a packed adapter
between two steps. Soft rows are run through the base when their adapter is placed; if that fails, the requests that
wait for it end.

Packed adapters that arrived and wait for room take host memory, and so do those that are being loaded: `take_wanted`
lets a load begin only if the host's budget has room for it beside them, in the order in which adapters became wanted.
If no request could ever start otherwise, one load goes on whatever it takes.

An adapter is evicted only for one that is used at once: the adapters of a request are placed together when all have
arrived and fit, or not at all. So every eviction lets a request start, and no two requests evict each other's adapters
forever.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot
from weft.engine.block_manager import BlockManager
from weft.engine.observer import Observer
from weft.engine.outbox import AdaptersResident, Outbox
from weft.engine.request import Request
from weft.engine.runner import Runner, is_lost
from weft.errors import AdapterConflict, Overloaded, WeftError
from weft.kernels.faults import is_out_of_memory
from weft.methods.protocol import Virtual

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Resident:
    packed: PackedAdapter
    slot: AdapterSlot
    blocks: list[int]
    holders: int = 0


class HostMemory(Protocol):
    """The budget for packed adapters on the host, which its cache shares with those on their way (`AdapterLoader`)."""

    @property
    def capacity_bytes(self) -> int: ...

    def size_of(self, digest: AdapterDigest, /) -> int:
        """Return the bytes that an adapter will take once it is loaded; 0 if that is unknown."""
        ...

    def reserve(self, on_the_way: Mapping[AdapterDigest, int]) -> None:
        """Leave room for these adapters, by their bytes; this replaces what was reserved before."""
        ...


class Residency:
    """Device memory of adapters; decides for the scheduler whether a request can start.

    wanted, failures: adapters to load, and those that could not be placed; the engine takes them after each schedule.
    """

    def __init__(
        self, runner: Runner, blocks: BlockManager, observer: Observer, outbox: Outbox, host: HostMemory
    ) -> None:
        self._runner = runner
        self._blocks = blocks
        self._observer = observer
        self._outbox = outbox
        self._host = host
        self._resident: OrderedDict[AdapterDigest, _Resident] = OrderedDict()  # least recently used first
        self.wanted: list[AdapterDigest] = []  # to load
        self._pending: set[AdapterDigest] = set()  # wanted, not arrived yet
        self._loading: dict[AdapterDigest, int] = {}  # by expected bytes; 0 if unknown
        self._reserved: dict[AdapterDigest, int] = {}
        self._arrived: dict[AdapterDigest, PackedAdapter] = {}  # arrived, not placed yet
        self.num_placed = 0
        self.failures: dict[AdapterDigest, WeftError] = {}  # arrived, but could not be placed
        self._seekers: set[Request] = set()  # not admitted
        self._awaited: dict[AdapterDigest, list[Future[None]]] = {}  # preloads
        self._pinned: set[AdapterDigest] = set()
        self.slots_of: dict[Request, tuple[AdapterSlot, ...]] = {}

    def resident(self) -> frozenset[AdapterDigest]:
        return frozenset(self._resident)

    def is_loading(self, request: Request) -> bool:
        """Return whether an adapter of the request is still being loaded."""
        return any(digest in self._pending for digest in request.digests)

    def prefetch(self, request: Request) -> None:
        """Load the adapters of a waiting request to the host, whose cache decides what stays; nothing is kept here."""
        for digest in request.digests:
            if digest not in self._resident and digest not in self._arrived:
                self._want(digest)

    def admit(self, request: Request) -> bool:
        """Hold every adapter of a request; False if one is still being loaded, or has no room."""
        if request in self.slots_of:
            return True
        digests = request.digests
        if not self._bring(digests):
            self._seekers.add(request)
            return False
        self._seekers.discard(request)
        for digest in digests:
            resident = self._resident[digest]
            resident.holders += 1
            self._resident.move_to_end(digest)
            if resident.blocks:
                self._blocks.share_virtual(request, resident.blocks)
        self.slots_of[request] = tuple(self._resident[digest].slot for digest in digests)
        return True

    def release(self, request: Request) -> None:
        """Drop a request's holds and wants: it ended, or lets others go first."""
        if request.virtual_blocks:
            self._blocks.unshare_virtual(request)
        if self.slots_of.pop(request, None) is not None:
            for digest in request.digests:
                self._resident[digest].holders -= 1
                self._resident.move_to_end(digest)
        if request in self._seekers:
            self._seekers.remove(request)
            for digest in request.digests:
                self._forget_unwanted(digest)

    def release_all(self, requests: Collection[Request]) -> bool:
        """Release the requests that hold adapters; False if none does."""
        holding = [request for request in requests if self.slots_of.get(request)]
        for request in holding:
            self.release(request)
        return bool(holding)

    def can_fit(self, request: Request) -> bool:
        """Return whether the adapters of a request fit beside the pinned ones, once all others are evicted.

        An adapter that is not loaded yet counts as 0 bytes.
        """
        own = set(request.digests)
        packed_adapters = [resident.packed for g, resident in self._resident.items() if g in own or g in self._pinned]
        packed_adapters += [packed for g, packed in self._arrived.items() if g in own]
        num_bytes, num_blocks = self._sizes(packed_adapters)
        return num_bytes <= self._runner.slots.capacity_bytes and num_blocks <= self._blocks.num_blocks

    def arrived(self, digest: AdapterDigest, packed: PackedAdapter) -> None:
        """Take a loaded adapter: place it if it was preloaded or pinned, else keep it until its request starts."""
        self._loading.pop(digest, None)
        if digest not in self._pending:
            return  # evicted while it was being loaded
        self._pending.discard(digest)
        self._arrived[digest] = packed
        if digest in self._awaited or digest in self._pinned:
            self._bring([digest])
        self._answer(digest)

    def failed(self, digest: AdapterDigest, error: WeftError) -> None:
        """End the wait for a load that failed; the next request for the adapter loads it again."""
        self._loading.pop(digest, None)
        self._pending.discard(digest)
        for future in self._awaited.pop(digest, ()):
            future.set_exception(error)

    def take_wanted(self) -> list[AdapterDigest]:
        """Return the adapters whose loads may begin now; the others stay in `wanted`."""
        waiting = deque(dict.fromkeys(digest for digest in self.wanted if digest in self._pending))
        taken: list[AdapterDigest] = []
        while waiting and self._may_load(self._host.size_of(waiting[0])):
            digest = waiting.popleft()
            self._loading[digest] = self._host.size_of(digest)
            taken.append(digest)
        self.wanted = list(waiting)
        on_the_way = self._on_the_way()
        if on_the_way != self._reserved:
            self._reserved = on_the_way
            self._host.reserve(on_the_way)
        return taken

    def _may_load(self, size_bytes: int) -> bool:
        left = self._host.capacity_bytes - sum(self._on_the_way().values())
        if 0 in self._loading.values():
            left = 0  # one load of unknown size at a time
        return max(size_bytes, 1) <= left or not (self._loading or self._is_any_complete())

    def _on_the_way(self) -> dict[AdapterDigest, int]:
        return self._loading | {digest: packed.size_bytes for digest, packed in self._arrived.items()}

    def _is_any_complete(self) -> bool:
        """Return whether a request waits for room alone, which others make when they end."""
        return any(
            all(digest in self._resident or digest in self._arrived for digest in request.digests)
            for request in self._seekers
        )

    def take_failures(self) -> dict[AdapterDigest, WeftError]:
        """Return the adapters that could not be placed since the last call; a new request loads them again."""
        failures, self.failures = self.failures, {}
        return failures

    def preload(
        self, digest: AdapterDigest, future: "Future[None]", *, packed: PackedAdapter | None = None, pin: bool = False
    ) -> None:
        """Do what `Engine.preload` promises; `future` ends when the adapter is on the device, or with the error."""
        if pin:
            self._pinned.add(digest)
        if packed is not None and digest not in self._resident:
            self._pending.discard(digest)
            self._arrived[digest] = packed
        self._awaited.setdefault(digest, []).append(future)
        self._bring([digest])
        self._answer(digest)

    def fail_all(self, error: WeftError) -> None:
        for digest in list(self._awaited):
            self.failed(digest, error)

    def unpin(self, digest: AdapterDigest) -> None:
        """Let the adapter be evicted when room is needed."""
        self._pinned.discard(digest)
        self._forget_unwanted(digest)

    def evict_virtual(self) -> bool:
        """Evict the longest unused adapter with virtual positions, to free KV blocks; False if there is none."""
        for digest, resident in self._resident.items():
            if resident.blocks and self._can_leave(digest):
                self._take_off(digest, for_room=True)
                return True
        return False

    def evict_idle(self) -> None:
        """Evict every adapter that no request holds and that is not pinned, to free device memory."""
        for digest, resident in list(self._resident.items()):
            if resident.packed.buffer.nbytes and self._can_leave(digest):
                self._take_off(digest, for_room=True)

    def evict(self, digest: AdapterDigest) -> int | None:
        """Remove an adapter and its pin from the device; return the freed bytes, or None if a request holds it.

        An adapter that is being loaded is no longer awaited.
        """
        resident = self._resident.get(digest)
        if resident is not None and resident.holders:
            return None
        self._pinned.discard(digest)
        self._arrived.pop(digest, None)
        self.failures.pop(digest, None)
        self.failed(digest, AdapterConflict("ADAPTER_UNREGISTERED", "adapter_id: was taken out of memory meanwhile"))
        return 0 if resident is None else self._take_off(digest, for_room=False)

    def _bring(self, digests: Sequence[AdapterDigest]) -> bool:
        """Make all of these resident, or change nothing on the device and want those that have not arrived."""
        if any(digest in self.failures for digest in digests):
            return False
        missing = [digest for digest in dict.fromkeys(digests) if digest not in self._resident]
        if not missing:
            return True
        packed_adapters = {digest: self._arrived[digest] for digest in missing if digest in self._arrived}
        for digest in missing:
            if digest not in packed_adapters:
                self._want(digest)
        if len(packed_adapters) < len(missing) or not self._make_room(packed_adapters.values(), keep=digests):
            return False
        return all(self._place(digest, packed) for digest, packed in packed_adapters.items())

    def _want(self, digest: AdapterDigest) -> None:
        if digest not in self._pending:
            self._pending.add(digest)
            self.wanted.append(digest)

    def _answer(self, digest: AdapterDigest) -> None:
        """End the futures that await an adapter, unless it is still being loaded."""
        if digest in self._pending:
            return
        if digest in self._resident:
            for future in self._awaited.pop(digest, ()):
                future.set_result(None)
        else:
            no_room = Overloaded(
                "POOL_EXHAUSTED",
                "adapter_id: no room on the device; everything there is in use or pinned",
                metadata={"quota": "adapter_device_bytes"},
                retry_after_s=1.0,
            )
            self.failed(digest, self.failures.get(digest, no_room))
        self._forget_unwanted(digest)

    def _forget_unwanted(self, digest: AdapterDigest) -> None:
        """Drop an arrived adapter that no request and no call wants any more."""
        wanted = digest in self._awaited or digest in self._pinned
        if not wanted and not any(digest in request.digests for request in self._seekers):
            self._arrived.pop(digest, None)

    def _place(self, digest: AdapterDigest, packed: PackedAdapter) -> bool:
        """Put an adapter that fits on the device; False if it fails for want of memory or in its virtual positions."""
        del self._arrived[digest]
        try:
            slot = self._runner.slots.put(packed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.failures[digest] = _short_of_memory()
            return False
        blocks = self._blocks.take_virtual(packed.num_virtual_tokens)
        assert blocks is not None
        assert slot is not None
        failure = None if packed.virtual is None else self._write_virtual(blocks, packed.virtual)
        if failure is not None:
            self._runner.slots.drop(slot)
            self._blocks.drop_virtual(blocks)
            self.failures[digest] = failure
            return False
        self._resident[digest] = _Resident(packed, slot, blocks)
        self.num_placed += 1
        self._observer.adapter_placed(packed)
        self._outbox.publish(AdaptersResident(self.resident()))
        return True

    def _write_virtual(self, blocks: list[int], virtual: Virtual) -> WeftError | None:
        """Write virtual positions to the KV pool; return the error, or None. A fault fatal to the device is raised."""
        try:
            self._runner.write_virtual(blocks, virtual)
        except WeftError as error:
            return error
        except Exception as error:
            if is_lost(self._runner, error):
                raise
            if is_out_of_memory(error):
                return _short_of_memory()
            _log.exception("engine: computing the virtual positions of an adapter failed")
            return WeftError("STEP_FAILED", "computing the adapter's virtual positions failed")
        return None

    def _make_room(self, packed_adapters: Collection[PackedAdapter], keep: Collection[AdapterDigest]) -> bool:
        """Evict adapters until all of these fit; return False and evict none if that cannot suffice."""
        missing_bytes, missing_blocks = self._sizes(packed_adapters)
        missing_bytes -= self._runner.slots.free_bytes
        missing_blocks -= self._blocks.num_free_blocks
        leaving = []
        for digest, resident in self._resident.items():
            gives_bytes = missing_bytes > 0 and resident.packed.buffer.nbytes > 0
            gives_blocks = missing_blocks > 0 and len(resident.blocks) > 0
            if (gives_bytes or gives_blocks) and self._can_leave(digest, keep):
                leaving.append(digest)
                missing_bytes -= resident.packed.buffer.nbytes
                missing_blocks -= len(resident.blocks)
        if missing_bytes > 0 or missing_blocks > 0:
            return False
        for digest in leaving:
            self._take_off(digest, for_room=True)
        return True

    def _sizes(self, packed_adapters: Collection[PackedAdapter]) -> tuple[int, int]:
        """Return the bytes of slots, and the KV blocks, that these adapters take together."""
        num_blocks = sum(self._blocks.count(packed.num_virtual_tokens) for packed in packed_adapters)
        return sum(packed.buffer.nbytes for packed in packed_adapters), num_blocks

    def _can_leave(self, digest: AdapterDigest, keep: Collection[AdapterDigest] = ()) -> bool:
        return not self._resident[digest].holders and digest not in self._pinned and digest not in keep

    def _take_off(self, digest: AdapterDigest, *, for_room: bool) -> int:
        resident = self._resident.pop(digest)
        freed = self._runner.slots.drop(resident.slot) + resident.packed.kv_bytes
        self._blocks.drop_virtual(resident.blocks)
        self._observer.adapter_left(resident.packed, for_room=for_room)
        self._outbox.publish(AdaptersResident(self.resident()))
        return freed


def _short_of_memory() -> Overloaded:
    text = "adapter_id: the device is short of memory for this adapter now"
    return Overloaded("POOL_EXHAUSTED", text, metadata={"quota": "device_memory"}, retry_after_s=1.0)
