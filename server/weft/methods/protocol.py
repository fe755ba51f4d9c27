"""What a PEFT method is, and what it is fitted to.

Shape legend of the whole code base: `T` rows (tokens) of the flattened batch, `B` requests, `L` layers, `I`/`O` in and
out features of a site, `R` rank, `S` adapter slots, `H` heads, `D` head dim, `P` virtual positions, `E` embedding size,
`N` entries.

A *site* is one wrapped module of the base: a linear one, the output head, or a norm with a bias. A method acts at a
site through pure functions that return the delta, never the sum:

    pre(params, x)         added to the input of the base weight:    x' = x + Σ gate · pre(x)
    post(params, x, y)     added to its output, y = W₀x':            out = y + Σ gate · post(x, y)
    after(params, y, r)    added to a sublayer's output y; r is the residual stream that entered the sublayer

Every delta sees the input `x` as it was before any `pre`. The base output `y` is made of x', so it holds the `pre` of
every adapter of the row; no delta sees another's `post` or `after` at its own site. Both are what earlier modules have
made of the row, adapters included.
A method that has no site acts through *virtual positions* before the first token: their keys and values (prefix
tuning), or the embedding rows that the base makes them from (prompt tuning).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from enum import IntEnum, StrEnum
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from weft.config import AdapterLimits
from weft.methods.checkpoint.schema import Schema
from weft.methods.count import Count

T = TypeVar("T")


class SiteKind(StrEnum):
    """What a site is. "All linear modules" means LINEAR alone: the head and the norms are touched by name only."""

    LINEAR = "linear"
    HEAD = "head"  # the output embedding; its rows are the step's sample rows
    NORM = "norm"  # a norm with a bias; in and out features are its width


class BaseWeight(Protocol):
    """What the base holds at one site, frozen."""

    @property
    def bias(self) -> Tensor | None:
        """[O], in the base's dtype; None where the module has none."""
        ...

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight [O, I], dequantized, as blocks [N, I] of its rows in order; N is bounded by a block's bytes."""
        ...


class ReadBase(Protocol):
    """Runs a function of one site's weight where the base's memory may be read, and gives what it returns."""

    def __call__(self, function: Callable[[BaseWeight], T], /) -> T: ...


@dataclass(frozen=True, slots=True)
class Site:
    """One wrapped module. `name` is its module path in the base, `index` its row in the slot tables.

    read_base: the way to its weight, for methods that need it (DoRA); None where a base is only described.
    sublayer: "attention" or "mlp" where the site's output is what that sublayer adds to the residual stream, else "".
    layer: which decoder layer that is; None where `sublayer` is "".
    norm: module path of the norm that opens the sublayer, whose input is the residual; "" where no norm has that place.
    """

    index: int
    name: str
    in_features: int
    out_features: int
    kind: SiteKind = SiteKind.LINEAR
    read_base: ReadBase | None = field(default=None, compare=False, repr=False)
    sublayer: str = ""
    layer: int | None = None
    norm: str = ""

    @property
    def suffix(self) -> str:
        """The last part of the path, as `target_modules` lists name it."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """What an adapter must fit: the sites of a base, the shape of its KV cache and the width of its embedding.

    digest: fingerprint of the weights and of how they are held: what keys and values depend on.
    held_as: how the linear weights are held, such as "nf4".
    same_weights: by the digest that these weights have when they are held otherwise, how they are held then. Adapters
        that name one of them are served; those that name any other base are refused.
    rope_factors: the rotary factors that it was fixed to where they depend on the longest request (model/rope.py),
        else "".
    """

    sites: Mapping[str, Site]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    embedding_size: int
    digest: str
    name: str
    held_as: str = ""
    same_weights: Mapping[str, str] = field(default_factory=dict[str, str])
    rope_factors: str = ""

    def of_kind(self, *kinds: SiteKind) -> list[Site]:
        """The sites of these kinds, in order."""
        return [site for site in self.sites.values() if site.kind in kinds]

    def read_through(self, run: Callable[[Callable[[], Any]], Any]) -> "BaseShape":
        """The same base, whose weights are read by functions that `run` runs: where only one thread may, in that."""

        def route(read_base: ReadBase, function: Callable[[BaseWeight], Any], /) -> Any:
            return run(partial(read_base, function))

        sites = {
            name: site if site.read_base is None else replace(site, read_base=partial(route, site.read_base))
            for name, site in self.sites.items()
        }
        return replace(self, sites=sites)


Drop = Callable[[Tensor], Tensor]  # dropout, as training draws it


def keep(tensor: Tensor) -> Tensor:
    """Drop nothing: what evaluation and serving do."""
    return tensor


def require_dropout(share: float) -> None:
    """Raise ValueError unless `share` is one that dropout can drop."""
    if not 0 <= share < 1:
        raise ValueError(f"dropout: must be at least 0 and below 1, given {share}")


class DeltaKind(IntEnum):
    """What a table row of a slot does at a site, as the kernels know it (the `kind` column of a site's table)."""

    NONE = 0
    LORA = 1
    SCALE_OUTPUT = 2
    SCALE_INPUT = 3
    BIAS = 4
    BOTTLENECK = 5
    BOTTLENECK_SUM = 6
    BOTTLENECK_RESIDUAL = 7
    BOTTLENECK_NORMED = 8

    @property
    def reads_residual(self) -> bool:
        """Whether it needs the residual stream that entered the site's sublayer."""
        return self in (DeltaKind.BOTTLENECK_SUM, DeltaKind.BOTTLENECK_RESIDUAL)


class Packed(NamedTuple):
    """One kind of delta of one adapter at one site, as slots store it: the kernels' layout, contiguous.

    first, second: what `kind` defines (kernels/cpu/deltas.py has the table); `second` is None where one tensor is all.
    """

    kind: DeltaKind
    rank: int
    first: Tensor
    second: Tensor | None


class VirtualKV(NamedTuple):
    """Keys and values of `P` virtual positions, in every layer; keys are not rotated."""

    keys: Tensor  # [L, P, H, D]
    values: Tensor  # [L, P, H, D]

    @property
    def num_positions(self) -> int:
        return self.keys.shape[1]


class SoftRows(NamedTuple):
    """What the first layer reads at `P` virtual positions; the base makes keys and values of it, rotated as any.

    They go in behind the embedding module: a base that scales inside that module (Gemma) does not scale them.
    """

    rows: Tensor  # [P, E]

    @property
    def num_positions(self) -> int:
        return self.rows.shape[0]


Virtual = VirtualKV | SoftRows


def tensor_norms(params: Any) -> Mapping[str, float]:
    """The norm of every parameter tensor, by its field: what is said of a method that knows nothing better."""
    return {
        f"‖{name}‖": value.float().norm().item() for name, value in params._asdict().items() if torch.is_tensor(value)
    }


class MethodConfig(Protocol):
    """A method's settings: a frozen dataclass, whose fields are the keys of a recipe."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class Fitted(NamedTuple):
    """An adapter's config and parameters: by site, and of its virtual positions."""

    config: Any
    sites: Mapping[str, Any] = {}
    prefix: Any = None


class Format(NamedTuple):
    """One of the forms in which PEFT writes a method's adapters.

    peft_type, schema: what adapter_config.json calls it, and what its other keys may be.
    read: check a file's config, which has passed the schema, and its tensors. Raises InvalidAdapter.
    switch: a key of the config that is true in this form, if others have the same peft_type.
    """

    peft_type: str
    schema: Schema
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], BaseShape, AdapterLimits], Fitted]
    switch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One PEFT method: its name, its settings, its pure functions and its files. `Any` is its own parameter NamedTuple.

    usual: its config if nothing else is said; its type is the method's. fit(usual, base) names its modules as the base
        does, and raises ValueError for a base that has none of them.
    begin(config, base, generator) makes an untrained adapter, whose config is resolved: `target_modules` are all that
        it touches, `layers` and `exclude` are worked in. It raises ValueError for a setting that means nothing on the
        base, and InvalidAdapter if a bottleneck has no place.
    formats, write: the forms that are read, and what writes the first of them: its config's keys and its tensors.
    pack(params, dtype) lays one site's parameters out for slots, as one or more kinds of delta whose sum is the
        method's; unpack is its inverse, as views.
    virtual(params) gives the virtual positions of a method that adds some.
    rank(params) is one site's rank; 0 for methods without one.
    count(config, sites, base) is the number of parameters that a config trains at these sites, as a formula.
    norms(params) says how far parameters are from adding nothing, by what is measured (Frobenius norms).
    reads_residual(params) says whether `after` needs r at that site; where it does not, r may be None.
    """

    name: str
    usual: Any = None
    fit: Callable[[Any, BaseShape], Any] = lambda config, base: config
    begin: Callable[[Any, BaseShape, torch.Generator], Fitted] | None = None
    formats: tuple[Format, ...] = ()
    write: Callable[["Adapter", BaseShape], tuple[dict[str, Any], dict[str, Tensor]]] | None = None
    pre: Callable[[Any, Tensor], Tensor | None] | None = None
    post: Callable[[Any, Tensor, Tensor], Tensor | None] | None = None
    after: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    pack: Callable[[Any, torch.dtype], tuple[Packed, ...]] | None = None
    unpack: Callable[[tuple[Packed, ...]], Any] | None = None
    virtual: Callable[[Any], Virtual] | None = None
    rank: Callable[[Any], int] = lambda params: 0
    count: Callable[[Any, Sequence[Site], BaseShape], Count] | None = None
    norms: Callable[[Any], Mapping[str, float]] = lambda params: tensor_norms(params)
    reads_residual: Callable[[Any], bool] = lambda params: False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A fitted adapter: a method's parameters at the sites it touches, and its virtual positions if it has any."""

    method: Method
    config: Any
    sites: Mapping[str, Any]
    prefix: Any = None

    def tensors(self) -> list[Tensor]:
        """Every parameter tensor, in a fixed order."""
        bundles = [self.sites[name] for name in sorted(self.sites)]
        if self.prefix is not None:
            bundles.append(self.prefix)
        return [field for bundle in bundles for field in bundle if isinstance(field, Tensor)]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.method.virtual is None else self.method.virtual(self.prefix).num_positions

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """The tokens from which on it acts (methods/activation.py); () is everywhere."""
        return getattr(self.config, "invocation_tokens", ())

    @property
    def rank(self) -> int:
        """The largest rank at any site; 0 for methods without one."""
        return max(map(self.method.rank, self.sites.values()), default=0)
