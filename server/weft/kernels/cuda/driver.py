"""The CUDA kernels in the engine's terms: a driver of adapter rows."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from weft.kernels.cuda import deltas
from weft.kernels.cuda.routing import Routers, Runs, Sources
from weft.methods.protocol import DeltaKind, Site

DTYPES = deltas.ROW_DTYPES
_ONLY_INPUTS = 1 << DeltaKind.SCALE_INPUT


class Outline(Protocol):
    """All that launches depend on beside shapes."""

    @property
    def rank(self) -> int:
        """The largest of any slot."""
        ...

    @property
    def kinds(self) -> bytes:
        """By site, uint16 with a bit for each kind that a slot has there."""
        ...


class Slots(Sources, Protocol):
    """What the driver reads of a slot table."""

    device_table: Tensor  # int64 [num_sites, S, 4], on the device
    num_residual_readers: int  # slots that read the residual stream at some site, counted for each

    @property
    def outline(self) -> Outline:
        """Another object whenever it may have changed."""
        ...


class DriverFactory:
    """Makes one driver per step; looks at each site again only when what slots hold has changed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._outline: Outline | None = None
        self._table = torch.empty(0)
        self._kinds = memoryview(b"").cast("H")
        self._sites: dict[int, deltas.Site] = {}

    def __call__(
        self, slots: Slots, offsets: Tensor, slot_of_entry: Tensor, gates: Tensor, routed: Runs | None = None
    ) -> "CudaDriver":
        """offsets, slot_of_entry and gates are on the device, and are read when kernels run, not before."""
        if self._outline is not slots.outline:
            self._outline = slots.outline
            self._table = slots.device_table
            self._kinds = memoryview(self._outline.kinds).cast("H")
            self._sites = {}
        rows = deltas.Rows(offsets=offsets, slots=slot_of_entry, gates=gates)
        return CudaDriver(self, slots, rows, None if routed is None else Routers(slots, routed, rows))

    def site(self, site: Site) -> deltas.Site:
        """The kernels' view of a site."""
        found = self._sites.get(site.index)
        if found is None:
            assert self._outline is not None
            found = self._sites[site.index] = deltas.Site(
                table=self._table[site.index],
                size_in=site.in_features,
                size_out=site.out_features,
                weight_dtype=self._dtype,
                kinds=self._kinds[site.index],
                rank=self._outline.rank,
            )
        return found


class CudaDriver:
    """The gated deltas of one step: a few kernels per site, whatever the number of rows and adapters."""

    __slots__ = ("_factory", "_needs_residual", "_routers", "_rows")

    def __init__(self, factory: DriverFactory, slots: Slots, rows: deltas.Rows, routers: Routers | None) -> None:
        self._factory = factory
        self._needs_residual = slots.num_residual_readers > 0
        self._rows = rows
        self._routers = routers

    @property
    def needs_residual(self) -> bool:
        """Whether any resident adapter reads the residual stream."""
        return self._needs_residual

    @property
    def routes(self) -> bool:
        """Whether a row of the step belongs to a mixture."""
        return self._routers is not None

    def enter(self, layer: int, hidden: Tensor) -> None:
        """A layer begins: the gates of all mixtures' rows are made anew."""
        if self._routers is not None:
            self._routers.enter(layer, hidden.reshape(-1, hidden.shape[-1]))

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The site's output for `x` [1, T, I], written into what `base` returns; the residual is [1, T, O]."""
        here = self._factory.site(site)
        if not here.kinds:
            return base(x)
        x_prime = x
        if here.has(DeltaKind.SCALE_INPUT):
            x_prime = torch.empty_like(x)
            deltas.pre(x, x_prime, self._rows, here)
        y = base(x_prime)
        if here.kinds != _ONLY_INPUTS:
            deltas.post(x, y, self._rows, here, residual)
        return y
