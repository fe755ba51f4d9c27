"""The serving path in float64, with the reference driver and reference attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.serving import Row, Step
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.slots import AdapterSlot, SlotTable
from weft.kernels.selection import REFERENCE
from weft.methods.mixture import Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import Adapter
from weft.model.loader import Base


class ExactSlots(SlotTable):
    """Gives the reference driver adapters and routers in float64: slots keep float32, whose rounding would be visible.

    coming, coming_routers: those that are placed next, in order.
    """

    coming: list[Adapter]
    coming_routers: list[Mixture]
    exact: dict[AdapterSlot, Any]

    def put(self, packed: PackedAdapter) -> AdapterSlot | None:
        slot = super().put(packed)
        assert slot is not None
        if packed.router is None:
            self.exact[slot] = {site: _doubled(params) for site, params in self.coming.pop(0).sites.items()}
        else:
            router = self.coming_routers.pop(0)
            self.exact[slot] = router.config, MixtureParams(router.params.weight.double())
        return slot

    def params(self, slot: AdapterSlot) -> Any:
        return self.exact[slot]

    def router(self, slot: AdapterSlot) -> tuple[MixtureConfig, MixtureParams]:
        return self.exact[slot] if slot in self.exact else super().router(slot)  # `put` reads what it has just placed


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_doubled, value))
    return value


def exact_step(exact: Base, listed: Sequence[Row]) -> Step:
    """Return a step on a base in float64 that takes `listed`, its adapters and routers in float64, too."""
    step = Step(exact, REFERENCE)
    slots: Any = step.runner.slots
    slots.__class__ = ExactSlots
    slots.coming = [adapter for row in listed for adapter, _ in row.parts]
    slots.coming_routers = [row.mixture for row in listed if row.mixture is not None]
    slots.exact = {}
    return step
