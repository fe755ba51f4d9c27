"""Which adapters are on the device, and what keeps them there. Only the engine thread calls this.

An adapter is resident when its slot is filled and its virtual positions are in the KV pool. A request holds its
adapters from the step that starts it to its end; held and pinned adapters stay, the others leave, longest unused first,
when room is needed. What is missing is wanted once (`take_wanted`) and arrives as a slab between two steps.
Soft rows go through the base when their adapter is placed; if that fails, the requests that wait for it end.

An adapter leaves only for one that is used at once: all adapters of a request are placed together when all are here and
fit, or none is. So every eviction lets a request start, and no two requests drive each other's adapters out for ever.
"""

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future

from weft.adapters.identifiers import Generation
from weft.adapters.slab import Slab
from weft.adapters.slots import AdapterSlot
from weft.engine.block_manager import BlockManager
from weft.engine.observer import Observer
from weft.engine.outbox import AdaptersResident, Outbox
from weft.engine.request import Request
from weft.engine.runner import Runner
from weft.errors import AdapterConflict, Overloaded, WeftError
from weft.kernels.faults import is_fatal
from weft.methods.protocol import Virtual

_log = logging.getLogger(__name__)


class _Resident:
    __slots__ = ("blocks", "holders", "slab", "slot")

    def __init__(self, slab: Slab, slot: AdapterSlot, blocks: list[int]) -> None:
        self.slab = slab
        self.slot = slot
        self.blocks = blocks
        self.holders = 0


class Residency:
    """Device memory of adapters, as the scheduler sees it.

    wanted, failures: adapters to load, and those that could not be placed; the engine takes them after each schedule.
    """

    def __init__(self, runner: Runner, blocks: BlockManager, observer: Observer, outbox: Outbox) -> None:
        self._runner = runner
        self._blocks = blocks
        self._observer = observer
        self._outbox = outbox
        self._resident: OrderedDict[Generation, _Resident] = OrderedDict()  # least recently used first
        self.wanted: list[Generation] = []  # to be loaded
        self._pending: set[Generation] = set()  # wanted, and not here yet
        self._arrived: dict[Generation, Slab] = {}  # came, and found no room yet
        self.failures: dict[Generation, WeftError] = {}  # came, and could not be computed
        self._seekers: dict[Request, frozenset[Generation]] = {}  # requests that were not admitted, and what they need
        self._preloading: set[Generation] = set()
        self._awaited: dict[Generation, list[Future[None]]] = {}
        self._pinned: set[Generation] = set()
        self.slots_of: dict[Request, tuple[AdapterSlot, ...]] = {}

    def resident(self) -> frozenset[Generation]:
        """Return the generations on the device."""
        return frozenset(self._resident)

    def is_loading(self, request: Request) -> bool:
        """Return whether a load that the request needs is on its way."""
        return any(generation in self._pending for generation in request.generations)

    def foresee(self, request: Request) -> None:
        """Have what a queued request needs brought to the host while it waits for its turn.

        Nothing is kept here for it; the host's memory decides what stays.
        """
        for generation in request.generations:
            if generation not in self._resident and generation not in self._arrived:
                self._want(generation)

    def admit(self, request: Request) -> bool:
        """Hold every adapter of a request; False if one is not resident: it is on its way, or there is no room."""
        if request in self.slots_of:
            return True
        generations = request.generations
        if not self._bring(generations):
            self._seekers[request] = frozenset(generations)
            return False
        self._seekers.pop(request, None)
        for generation in generations:
            resident = self._resident[generation]
            resident.holders += 1
            self._resident.move_to_end(generation)
            if resident.blocks:
                self._blocks.share_virtual(request, resident.blocks)
        self.slots_of[request] = tuple(self._resident[generation].slot for generation in generations)
        return True

    def release(self, request: Request) -> None:
        """End a request's holds, and what it seeks: it ended, or waits and lets others go first."""
        if request.virtual_blocks:
            self._blocks.unshare_virtual(request)
        if self.slots_of.pop(request, None) is not None:
            for generation in request.generations:
                self._resident[generation].holders -= 1
                self._resident.move_to_end(generation)
        for generation in self._seekers.pop(request, ()):
            self._forget_unwanted(generation)

    def release_all(self, requests: Collection[Request]) -> bool:
        """Release those of the requests that hold adapters; False if none does."""
        holding = [request for request in requests if self.slots_of.get(request)]
        for request in holding:
            self.release(request)
        return bool(holding)

    def can_fit(self, request: Request) -> bool:
        """Return whether the adapters of a request have room beside the pinned ones, once all others are gone.

        What has not been loaded yet counts as nothing.
        """
        own = set(request.generations)
        slabs = [resident.slab for g, resident in self._resident.items() if g in own or g in self._pinned]
        slabs += [slab for g, slab in self._arrived.items() if g in own]
        num_blocks = sum(self._blocks.count(slab.num_virtual_tokens) for slab in slabs)
        num_bytes = sum(slab.buffer.nbytes for slab in slabs)
        return num_bytes <= self._runner.slots.capacity_bytes and num_blocks <= self._blocks.num_blocks

    def arrived(self, generation: Generation, slab: Slab) -> None:
        """Take a slab in: it waits for the step that starts its request, or goes to the device by itself."""
        if generation not in self._pending:
            return  # evicted while it was on its way
        self._pending.discard(generation)
        self._arrived[generation] = slab
        if generation in self._preloading or generation in self._pinned:
            self._bring([generation])
        self._answer(generation)
        self._forget_unwanted(generation)

    def failed(self, generation: Generation, error: WeftError) -> None:
        """End the wait for a load that failed; the next request for the adapter asks again."""
        self._pending.discard(generation)
        self._preloading.discard(generation)
        for future in self._awaited.pop(generation, ()):
            future.set_exception(error)

    def take_wanted(self) -> list[Generation]:
        """Return the adapters to load that the last call did not have."""
        wanted, self.wanted = dict.fromkeys(self.wanted), []
        return [generation for generation in wanted if generation in self._pending]

    def take_failures(self) -> dict[Generation, WeftError]:
        """Return the adapters that could not be placed since the last call, and why; a new request loads them again."""
        failures, self.failures = self.failures, {}
        return failures

    def preload(
        self, generation: Generation, future: "Future[None]", *, slab: Slab | None = None, pin: bool = False
    ) -> None:
        """Bring an adapter in without a request; `future` ends with it, or with why it cannot come now.

        slab: spares the load. pin: keep the adapter on the device.
        """
        if pin:
            self._pinned.add(generation)
        if slab is not None and generation not in self._resident:
            self._pending.discard(generation)
            self._arrived[generation] = slab
        self._awaited.setdefault(generation, []).append(future)
        if not self._bring([generation]) and generation not in self.failures:
            self._preloading.add(generation)
        self._answer(generation)

    def abandon(self, error: WeftError) -> None:
        """End every wait with `error`: nothing comes any more."""
        for generation in list(self._awaited):
            self.failed(generation, error)

    def unpin(self, generation: Generation) -> None:
        """Let the adapter leave when room is needed."""
        self._pinned.discard(generation)
        self._forget_unwanted(generation)

    def evict_virtual(self) -> bool:
        """Make the longest unused adapter with virtual positions leave, as KV runs short. False if there is none."""
        for generation, resident in self._resident.items():
            if resident.blocks and self._can_leave(generation):
                self._take_off(generation, for_room=True)
                return True
        return False

    def evict(self, generation: Generation) -> int | None:
        """Take an adapter and its pin off the device; returns the freed bytes, or None if a request holds it.

        One that is on its way is no longer awaited.
        """
        resident = self._resident.get(generation)
        if resident is not None and resident.holders:
            return None
        self._pinned.discard(generation)
        self._arrived.pop(generation, None)
        self.failures.pop(generation, None)
        self.failed(
            generation, AdapterConflict("ADAPTER_UNREGISTERED", "adapter_id: was taken out of memory meanwhile")
        )
        return 0 if resident is None else self._take_off(generation, for_room=False)

    def _bring(self, generations: Sequence[Generation]) -> bool:
        """Make all of these resident, or change nothing on the device; what is not here is asked for."""
        if any(generation in self.failures for generation in generations):
            return False
        missing = {g: self._arrived.get(g) for g in generations if g not in self._resident}
        if not missing:
            return True
        for generation, slab in missing.items():
            if slab is None:
                self._want(generation)
        slabs = {generation: slab for generation, slab in missing.items() if slab is not None}
        if len(slabs) < len(missing) or not self._make_room(slabs.values(), keep=generations):
            return False
        return all(self._place(generation, slab) for generation, slab in slabs.items())

    def _want(self, generation: Generation) -> None:
        if generation not in self._pending:
            self._pending.add(generation)
            self.wanted.append(generation)

    def _answer(self, generation: Generation) -> None:
        """End the futures that await an adapter, once no load of it is on its way."""
        if generation in self._pending:
            return
        for future in self._awaited.pop(generation, ()):
            if generation in self._resident:
                future.set_result(None)
                continue
            self._preloading.discard(generation)
            no_room = Overloaded(
                "POOL_EXHAUSTED",
                "adapter_id: no room on the device; everything there is in use or pinned",
                metadata={"quota": "adapter_device_bytes"},
                retry_after_s=1.0,
            )
            future.set_exception(self.failures.get(generation, no_room))
        self._forget_unwanted(generation)

    def _forget_unwanted(self, generation: Generation) -> None:
        """Let an arrived slab go if no request and no call wants it any more."""
        wanted = generation in self._preloading or generation in self._pinned
        if not wanted and not any(generation in sought for sought in self._seekers.values()):
            self._arrived.pop(generation, None)

    def _place(self, generation: Generation, slab: Slab) -> bool:
        """Put an adapter that fits on the device; False if its virtual positions cannot be computed."""
        blocks, slot = self._blocks.take_virtual(slab.num_virtual_tokens), self._runner.slots.put(slab)
        assert blocks is not None
        assert slot is not None
        del self._arrived[generation]
        self._preloading.discard(generation)
        failure = None if slab.virtual is None else self._write_virtual(blocks, slab.virtual)
        if failure is not None:
            self._runner.slots.drop(slot)
            self._blocks.drop_virtual(blocks)
            self.failures[generation] = failure
            return False
        self._resident[generation] = _Resident(slab, slot, blocks)
        self._observer.adapter_placed(slab)
        self._outbox.publish(AdaptersResident(self.resident()))
        return True

    def _write_virtual(self, blocks: list[int], virtual: Virtual) -> WeftError | None:
        """Return why it could not be done, or None if it was. A fault that spoils the device is not contained here."""
        try:
            self._runner.write_virtual(blocks, virtual)
        except WeftError as error:
            return error
        except Exception as error:
            if is_fatal(error):
                raise
            _log.exception("engine: computing the virtual positions of an adapter failed")
            return WeftError("STEP_FAILED", "computing the adapter's virtual positions failed")
        return None

    def _make_room(self, slabs: Collection[Slab], keep: Collection[Generation]) -> bool:
        """Let adapters leave until all `slabs` fit; False, with all still there, if even that would not do."""
        missing_bytes = sum(slab.buffer.nbytes for slab in slabs) - self._runner.slots.free_bytes
        wanted_blocks = sum(self._blocks.count(slab.num_virtual_tokens) for slab in slabs)
        missing_blocks = wanted_blocks - self._blocks.num_free_blocks
        leaving = []
        for generation, resident in self._resident.items():
            gives_bytes = missing_bytes > 0 and resident.slab.buffer.nbytes > 0
            gives_blocks = missing_blocks > 0 and len(resident.blocks) > 0
            if (gives_bytes or gives_blocks) and self._can_leave(generation, keep):
                leaving.append(generation)
                missing_bytes -= resident.slab.buffer.nbytes
                missing_blocks -= len(resident.blocks)
        if missing_bytes > 0 or missing_blocks > 0:
            return False
        for generation in leaving:
            self._take_off(generation, for_room=True)
        return True

    def _can_leave(self, generation: Generation, keep: Collection[Generation] = ()) -> bool:
        return not self._resident[generation].holders and generation not in self._pinned and generation not in keep

    def _take_off(self, generation: Generation, *, for_room: bool) -> int:
        resident = self._resident.pop(generation)
        freed = self._runner.slots.drop(resident.slot) + resident.slab.kv_bytes
        self._blocks.drop_virtual(resident.blocks)
        self._observer.adapter_left(resident.slab, for_room=for_room)
        self._outbox.publish(AdaptersResident(self.resident()))
        return freed
