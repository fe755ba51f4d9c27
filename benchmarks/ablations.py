"""Ablations: Weft without one of its fast paths. The product has no option for them.

An ablation replaces a part of the serving form, or gives the runner other kernels. Anything that depends on the path
goes with it, and is then missing on the other side of the comparison too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from torch import Tensor

from weft.adapters.slots import SlotTable
from weft.engine.drivers import routers
from weft.kernels.selection import Kernels
from weft.kernels.slot_tables import SlotTables
from weft.kernels.step import Step
from weft.methods.driver import EnterLayer
from weft.methods.inject import Driver
from weft.model import packed
from weft.model.loader import Base
from weft.model.serving_form import Part

Change = Callable[[Kernels], Kernels]


class Ablation(NamedTuple):
    """A change to a server before it computes.

    instead: replacements for parts of the serving form, by name.
    changes: applied in order to the selected kernels, before the runner gets them.
    """

    instead: tuple[tuple[str, Part], ...] = ()
    changes: tuple[Change, ...] = ()

    def kernels(self, selected: Kernels) -> Kernels:
        """Return the kernels that the runner gets."""
        return reduce(lambda kernels, change: change(kernels), self.changes, selected)


WHOLE = Ablation()
"""The full server, with nothing removed."""


def without(*parts: str) -> Ablation:
    """Leave parts of the serving form out."""
    return Ablation(instead=tuple((part, _leave) for part in parts))


def plain(ablation: Ablation) -> Ablation:
    """Add to an ablation that decode steps are not captured, as steps with prompts never are."""
    return ablation._replace(changes=tuple(dict.fromkeys((*ablation.changes, _uncaptured))))


def _leave(base: Base) -> None:
    """Leave the base as it is."""


def _for_onednn(base: Base) -> None:
    packed.lay_out(base.model, packed.OneDnnLinear)


def _uncaptured(kernels: Kernels) -> Kernels:
    return replace(kernels, capture=None)


def _reference_driver(kernels: Kernels) -> Kernels:
    return replace(kernels, driver=None)


def _reference_attention(kernels: Kernels) -> Kernels:
    return replace(kernels, attend=None)


class _RoutedByTorch(NamedTuple):
    """A driver whose mixtures get their gates from torch, request by request, and are otherwise ordinary rows."""

    driver: Driver
    routers: Sequence[EnterLayer]
    routes: bool = True

    @property
    def needs_residual(self) -> bool:
        return self.driver.needs_residual

    def enter(self, layer: int, hidden: Tensor) -> None:
        for enter in self.routers:
            enter(layer, hidden.reshape(-1, hidden.shape[-1]))

    def apply(self, *given: Any) -> Tensor:
        return self.driver.apply(*given)

    def apply_group(self, *given: Any) -> Sequence[Tensor]:
        return self.driver.apply_group(*given)


def _routed_by_torch(kernels: Kernels) -> Kernels:
    make = kernels.driver
    assert make is not None

    def driver(slots: SlotTable, step: Step) -> Driver:
        made = make(slots, step._replace(routing=None))
        if step.routing is None or step.entries is None:
            return made
        return _RoutedByTorch(made, list(routers(slots, step.entries, step)))

    return replace(kernels, driver=driver)


def _all_alike(slots: SlotTables) -> SlotTables:
    """Return slots that all seem to act at every site where any of them does."""

    def united(at: Mapping[int, int]) -> dict[int, int]:
        return dict.fromkeys(at, reduce(or_, at.values(), 0))

    own = {field.name: getattr(slots, field.name) for field in fields(SlotTables)}
    return SlotTables(**own | {"outputs_at": united(slots.outputs_at), "inputs_at": united(slots.inputs_at)})


def _asked_everywhere(kernels: Kernels) -> Kernels:
    make, decide = kernels.driver, kernels.capture_key
    assert make is not None
    return replace(
        kernels,
        driver=lambda slots, step: make(_all_alike(slots), step),
        capture_key=lambda slots, entries: decide(_all_alike(slots), entries),
    )


UNCAPTURED = plain(WHOLE)
REFERENCE_DRIVER = plain(Ablation(changes=(_reference_driver,)))  # it reads on the host, so it cannot be captured,
REFERENCE_ATTENTION = plain(Ablation(changes=(_reference_attention,)))  # and so does this
TORCH_ROUTERS = plain(Ablation(changes=(_routed_by_torch,)))
ONEDNN_PRODUCT = Ablation(instead=(("packing", _for_onednn),))
ASKED_EVERYWHERE = Ablation(changes=(_asked_everywhere,))
