"""Which adapters are on the device, and who keeps them there. Only the engine thread calls this.

An adapter is resident when its slot is filled and its virtual positions are in the KV pool. A request holds its
adapters from the step that starts it to its end; held and pinned adapters stay, the others leave, longest unused first,
when room is needed. What is missing is asked for once (`request_load`) and arrives as a slab between two steps.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from weft.adapters.identifiers import Generation
from weft.adapters.slab import Slab
from weft.adapters.slots import AdapterSlot
from weft.engine.block_manager import BlockManager
from weft.engine.request import Request
from weft.engine.runner import Runner


class _Resident:
    __slots__ = ("blocks", "holders", "slab", "slot")

    def __init__(self, slab: Slab, slot: AdapterSlot, blocks: list[int]) -> None:
        self.slab = slab
        self.slot = slot
        self.blocks = blocks
        self.holders = 0


class Residency:
    """Device memory of adapters, as the scheduler sees it."""

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        *,
        request_load: Callable[[Generation], None],
        evicted: Callable[[Slab], None] = lambda slab: None,
    ) -> None:
        self._runner = runner
        self._blocks = blocks
        self._request_load = request_load
        self._evicted = evicted
        self._resident: OrderedDict[Generation, _Resident] = OrderedDict()  # least recently used first
        self._arrived: dict[Generation, Slab] = {}
        self._pending: set[Generation] = set()
        self._pinned: set[Generation] = set()
        self.slots_of: dict[Request, tuple[AdapterSlot, ...]] = {}

    @property
    def num_pending(self) -> int:
        """Loads that were asked for and have not arrived."""
        return len(self._pending)

    def resident(self) -> frozenset[Generation]:
        """Generations on the device."""
        return frozenset(self._resident)

    def placement(self, generation: Generation) -> tuple[bool, bool]:
        """(on the device, arrived without finding room)."""
        return generation in self._resident, generation in self._arrived

    def admit(self, request: Request) -> bool:
        """Hold every adapter of a request; False where one is not resident yet (it is then on its way)."""
        if request in self.slots_of:
            return True
        generations = [use.generation for use in request.adapters]
        missing = [generation for generation in generations if not self._ensure(generation, keep=generations)]
        if missing:
            return False
        for generation in generations:
            resident = self._resident[generation]
            resident.holders += 1
            self._resident.move_to_end(generation)
            self._blocks.share_virtual(request, resident.blocks)
        self.slots_of[request] = tuple(self._resident[generation].slot for generation in generations)
        return True

    def release(self, request: Request) -> None:
        """The request ended: its holds end."""
        self._blocks.unshare_virtual(request)
        if self.slots_of.pop(request, None) is not None:
            for use in request.adapters:
                self._resident[use.generation].holders -= 1

    def arrived(self, generation: Generation, slab: Slab) -> None:
        """A load finished; the adapter is placed when a request is admitted, or now if it was asked for by itself."""
        self._pending.discard(generation)
        self._arrived[generation] = slab
        self._ensure(generation, keep=())

    def failed(self, generation: Generation) -> None:
        """A load failed; the next request for the adapter asks again."""
        self._pending.discard(generation)

    def preload(self, generation: Generation) -> None:
        """Bring an adapter in without a request."""
        self._ensure(generation, keep=())

    def pin(self, generation: Generation) -> None:
        """Keep the adapter on the device, bringing it in if need be."""
        self._pinned.add(generation)
        self._ensure(generation, keep=())

    def unpin(self, generation: Generation) -> None:
        """Let the adapter leave when room is needed."""
        self._pinned.discard(generation)

    def evict_idle(self) -> bool:
        """Make the longest unused adapter that nobody holds leave; False where there is none."""
        return self._evict_one(keep=())

    def evict(self, generation: Generation) -> int:
        """Take an adapter that nobody holds off the device; returns the device bytes that were freed."""
        self._arrived.pop(generation, None)
        if generation not in self._resident:
            return 0
        assert self._resident[generation].holders == 0, generation
        return self._leave(generation)

    def _ensure(self, generation: Generation, keep: Sequence[Generation]) -> bool:
        if generation in self._resident:
            return True
        slab = self._arrived.get(generation)
        if slab is not None:
            return self._place(generation, slab, keep)
        if generation not in self._pending:
            self._pending.add(generation)
            self._request_load(generation)
        return False

    def _place(self, generation: Generation, slab: Slab, keep: Sequence[Generation]) -> bool:
        blocks = self._blocks.take_virtual(slab.num_virtual_tokens)
        while blocks is None:
            if not self._evict_one(keep):
                return False
            blocks = self._blocks.take_virtual(slab.num_virtual_tokens)
        slot = self._runner.slots.put(slab)
        while slot is None:
            if not self._evict_one(keep):
                self._blocks.drop_virtual(blocks)
                return False
            slot = self._runner.slots.put(slab)
        if slab.virtual is not None:
            self._runner.write_virtual(blocks, slab.virtual)
        del self._arrived[generation]
        self._resident[generation] = _Resident(slab, slot, blocks)
        return True

    def _evict_one(self, keep: Sequence[Generation]) -> bool:
        for generation, resident in self._resident.items():
            if resident.holders == 0 and generation not in self._pinned and generation not in keep:
                self._leave(generation)
                self._evicted(resident.slab)
                return True
        return False

    def _leave(self, generation: Generation) -> int:
        resident = self._resident.pop(generation)
        freed = self._runner.slots.drop(resident.slot)
        self._blocks.drop_virtual(resident.blocks)
        if resident.slab.virtual is not None:
            freed += sum(tensor.nbytes for tensor in resident.slab.virtual)
        return freed
