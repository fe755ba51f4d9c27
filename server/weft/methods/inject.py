"""Wrapping of a base's modules where adapters meet it, the same way for serving and for training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from weft.methods.base_weight import LinearPart, ReadModule
from weft.methods.protocol import Site, SiteKind
from weft.methods.shapes import Float


class Driver(Protocol):
    """The interface through which a wrapped module gets the gated deltas of the current batch.

    A subclass that defines only `apply` routes nothing, reads no residual, and has no faster way for groups.
    """

    @property
    def needs_residual(self) -> bool:
        """Whether the residual stream must be kept for `apply`."""
        return False

    @property
    def routes(self) -> bool:
        """Whether `enter` must be called."""
        return False

    def enter(self, layer: int, hidden: Float[Tensor, "*T hidden"]) -> None:
        """Begin a layer; `hidden` is the residual stream that enters it."""

    def apply(
        self,
        site: Site,
        base: Callable[[Tensor], Tensor],
        x: Float[Tensor, "*T I"],
        residual: Float[Tensor, "*T O"] | None = None,
    ) -> Float[Tensor, "*T O"]:
        """Return the site's output for its input `x`.

        residual: the stream that entered the site's sublayer, if the driver needs it and the site has it.
        """
        ...

    def apply_group(self, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of sites that share an input; `base` returns the base outputs of all, side by side."""
        return apply_each(self, sites, base, x)


class AdapterContext:
    """The driver that the wrapped modules of one model use now. There is one per model; two engines never share one.

    residual: the stream that entered the sublayer being computed. Hooks on the norms that open sublayers keep it, and
    hooks on layers call the driver when a layer begins. They exist only while drivers need them, so others pay nothing.
    """

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.residual: Tensor | None = None
        self._norms: Sequence[nn.Module] = ()
        self._layers: Sequence[nn.Module] = ()
        self._residual_hooks: list[RemovableHandle] = []
        self._layer_hooks: list[RemovableHandle] = []

    @contextmanager
    def use(self, driver: Driver | None) -> Iterator[None]:
        """Run the model with `driver`; None runs the base alone."""
        assert self.driver is None, "nested batches on one model"
        self.driver = driver
        if driver is not None:
            if driver.needs_residual is not bool(self._residual_hooks):
                self._hook_norms(driver.needs_residual)
            if driver.routes is not bool(self._layer_hooks):
                self._hook_layers(driver.routes)
        try:
            yield
        finally:
            self.driver = None
            self.residual = None

    def watch(self, norms: Sequence[nn.Module], layers: Sequence[nn.Module]) -> None:
        """Set the norms whose input is the residual stream, and the layers. Called once, before the first batch."""
        self._norms = norms
        self._layers = layers

    def _hook_norms(self, wanted: bool) -> None:
        for hook in self._residual_hooks:
            hook.remove()
        self._residual_hooks = [norm.register_forward_pre_hook(self._keep) for norm in self._norms] if wanted else []

    def _hook_layers(self, wanted: bool) -> None:
        for hook in self._layer_hooks:
            hook.remove()
        self._layer_hooks = [
            layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, layer in enumerate(self._layers if wanted else ())
        ]

    def _enter(self, index: int, layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if self.driver is not None:
            self.driver.enter(index, inputs[0] if inputs else named["hidden_states"])

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.driver is not None:  # the base alone may run between two batches, and would leave its residual behind
            self.residual = inputs[0]


class AdaptedLinear(nn.Module):
    """A linear module of the base, or a norm with a bias, wrapped where adapters meet it."""

    def __init__(self, base: nn.Module, site: Site, context: AdapterContext) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.context = context

    def forward(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        driver = self.context.driver
        if driver is None:
            return self.base(x)
        return driver.apply(self.site, self.base, x, self.context.residual if self.site.norm else None)

    @property
    def weight(self) -> Tensor:
        """The base's weight: model code reads its dtype and device."""
        return cast(Tensor, self.base.weight)


class LinearGroup(nn.Module):
    """Linear modules that share an input (q, k and v; gate and up), held and computed as one.

    Model code calls them one by one with the same tensor: the first call computes all outputs, the last drops them.
    """

    def __init__(self, whole: nn.Module, sites: Sequence[Site], context: AdapterContext) -> None:
        super().__init__()
        self.whole = whole
        self.sites = tuple(sites)
        self.context = context
        self.sizes = [site.out_features for site in sites]
        self._x: Tensor | None = None
        self._outputs: Sequence[Tensor] = ()

    def output(self, place: int, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """Return the output of the module at `place` for `x`."""
        if x is not self._x:
            self._outputs, self._x = self.outputs(x), x
        output = self._outputs[place]
        if place == len(self.sizes) - 1:
            self._outputs, self._x = (), None
        return output

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Compute the outputs of all modules for `x`."""
        driver = self.context.driver
        return self.whole(x).split(self.sizes, -1) if driver is None else driver.apply_group(self.sites, self.whole, x)


class GroupedLinear(AdaptedLinear):
    """One module of a group, in the place where model code looks for it."""

    group: LinearGroup

    def __init__(self, group: LinearGroup, place: int) -> None:
        nn.Module.__init__(self)
        self.group = group
        self.place = place
        self.site = group.sites[place]
        self.context = group.context

    @property
    def base(self) -> LinearPart:  # pyright: ignore[reportIncompatibleVariableOverride]  # rows of a module
        """This module's part of the group."""
        return LinearPart(lambda: self.group.whole, sum(self.group.sizes[: self.place]), self.site.out_features)

    def forward(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        return self.group.output(self.place, x)


def apply_each(driver: Driver, sites: Sequence[Site], base: Callable[[Tensor], Tensor], x: Tensor) -> Sequence[Tensor]:
    """Compute `apply_group` by `apply`, for a driver that changes the input of some of the sites or has no faster way.

    The base weights are multiplied once for all sites that leave the input as it is.
    """
    sizes = [site.out_features for site in sites]
    shared: Sequence[Tensor] = ()

    def product(place: int, x_prime: Tensor) -> Tensor:
        nonlocal shared
        if x_prime.data_ptr() != x.data_ptr():
            return base(x_prime).split(sizes, -1)[place]
        shared = shared or base(x).split(sizes, -1)
        return shared[place]

    return [driver.apply(site, partial(product, place), x) for place, site in enumerate(sites)]


def adapter_sites(model: nn.Module, *, head: nn.Module | None = None) -> list[Site]:
    """Return every linear module (torch, bitsandbytes, GPT-2's Conv1D) and every norm with a bias, in module order.

    head: the output embedding, which is a site of its own kind.
    """
    sites: list[Site] = []
    for name, module in model.named_modules():
        features = _features(module)
        if features is not None:
            norm_or_linear = SiteKind.NORM if isinstance(module, nn.LayerNorm) else SiteKind.LINEAR
            kind = SiteKind.HEAD if module is head else norm_or_linear
            sites.append(Site(len(sites), name, *features, kind=kind, read_base=ReadModule(model, name)))
    return sites


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # stores its weight as [I, O]
        return module.nx, module.nf
    if isinstance(module, nn.LayerNorm) and module.bias is not None:  # a norm without a bias has nothing to adapt
        return module.normalized_shape[-1], module.normalized_shape[-1]
    return None


def inject(model: nn.Module, sites: list[Site], context: AdapterContext, layers: Sequence[str] = ()) -> None:
    """Replace each site's module by an AdaptedLinear around it, in place; `layers` are paths of the decoder layers."""
    for site in sites:
        model.set_submodule(site.name, AdaptedLinear(model.get_submodule(site.name), site, context))
    norms = dict.fromkeys(site.norm for site in sites if site.norm)
    context.watch(*([model.get_submodule(name) for name in names] for names in (norms, layers)))
