"""The engine's driver of adapter rows, built on the CUDA kernels."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from weft.kernels.cuda import deltas
from weft.kernels.cuda.launch import GROUP_MAX
from weft.kernels.cuda.routing import Routers
from weft.kernels.slot_tables import CaptureKey, SlotTables
from weft.kernels.step import Step
from weft.methods.inject import apply_each
from weft.methods.protocol import DeltaKind, Site

DTYPES = deltas.ROW_DTYPES
_ONLY_INPUTS = 1 << DeltaKind.SCALE_INPUT
_ALONE = sum(1 << kind for kind in deltas.ALONE)


class DriverFactory:
    """Makes one driver per step, and looks at each site again only after the contents of slots have changed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._key: CaptureKey | None = None
        self._table = torch.empty(0)
        self._kinds = memoryview(b"").cast("H")
        self._sites: dict[tuple[int, int], deltas.Site] = {}

    def __call__(self, slots: SlotTables, step: Step) -> "CudaDriver":
        """Return the driver of a step on the device, which is read only when kernels run."""
        key = slots.capture_key
        if self._key is not key:
            self._key = key
            self._table = slots.device_table
            self._kinds = memoryview(key.kinds).cast("H")
            self._sites = {}
        assert step.entries is not None
        rows = deltas.rows_of(step.entries)
        routers = None if step.routing is None else Routers(slots, step, key.choices)
        return CudaDriver(self, slots, rows, routers)

    def kinds(self, sites: Sequence[Site]) -> int:
        """Return the kinds that slots have at any of these sites, one bit each."""
        return reduce(or_, (self._kinds[site.index] for site in sites))

    def site(self, *sites: Site) -> deltas.Site:
        """Return the kernels' view of a site, or of a group whose sites follow each other in the table."""
        first = sites[0]
        key = first.index, len(sites)
        found = self._sites.get(key)
        if found is None:
            assert self._key is not None
            found = self._sites[key] = deltas.Site(
                table=self._table[first.index : first.index + len(sites)],
                size_in=first.in_features,
                sizes_out=tuple(site.out_features for site in sites),
                weight_dtype=self._dtype,
                kinds=self.kinds(sites),
                rank=self._key.rank,
            )
        return found


class CudaDriver:
    """The gated deltas of one step: a few kernels per site, whatever the number of rows and adapters.

    needs_residual: whether any resident adapter reads the residual stream.
    routes: whether a row of the step belongs to a mixture.
    """

    def __init__(self, factory: DriverFactory, slots: SlotTables, rows: deltas.Rows, routers: Routers | None) -> None:
        self.needs_residual = slots.num_residual_readers > 0
        self.routes = routers is not None
        self._factory = factory
        self._rows = rows
        self._routers = routers

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Recompute the gates of all mixtures' rows in one launch, as a layer begins."""
        if self._routers is not None:
            self._routers.enter(layer, hidden.reshape(-1, hidden.shape[-1]))

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the site's output for `x` [1, T, I], written into the result of `base`. The residual is [1, T, O]."""
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

    def apply_group(self, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of sites that share an input, if possible from one product and one site's launches."""
        kinds = self._factory.kinds(sites)
        follow = [site.index for site in sites] == [sites[0].index + place for place in range(len(sites))]
        if len(sites) > GROUP_MAX or not follow or kinds & _ALONE:
            return apply_each(self, sites, base, x)
        y = base(x)
        if kinds:
            deltas.post(x, y, self._rows, self._factory.site(*sites))
        return y.split([site.out_features for site in sites], -1)
