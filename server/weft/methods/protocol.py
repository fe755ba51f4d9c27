"""The interface of a PEFT method, and the shape of a base that it is fitted to.

Shape legend of the whole code base: `T` rows (tokens) of the flattened batch, `B` requests, `L` layers, `I`/`O` in and
out features of a site, `R` rank, `S` adapter slots, `H` heads, `D` head dim, `P` virtual positions, `E` embedding size,
`N` entries.

A *site* is one wrapped module of the base: a linear one, the output head, or a norm with a bias. A method acts at a
site through pure functions that return the delta, never the sum:

    pre(params, x)         added to the input of the base weight:    x' = x + Σ gate · pre(x)
    post(params, x, y)     added to its output, y = W₀x':            out = y + Σ gate · post(x, y)
    after(params, y, r)    added to a sublayer's output y; r is the residual stream that entered the sublayer

Every delta reads the input `x` as it was before any `pre`. The base output `y` is computed from x', so it holds the
`pre` of every adapter of the row. No delta reads another's `post` or `after` at its own site. Both x and y include the
effect of earlier modules on the row, adapters included.
A method without sites acts through *virtual positions* before the first token: their keys and values (prefix tuning),
or the embedding rows from which the base computes them (prompt tuning).
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
from weft.methods.shapes import Float

T = TypeVar("T")


class SiteKind(StrEnum):
    """The kind of a site. "All linear modules" means LINEAR alone: the head and the norms are adapted only if named."""

    LINEAR = "linear"
    HEAD = "head"  # the output embedding; its rows are the step's sample rows
    NORM = "norm"  # a norm with a bias; in and out features are its width


class BaseWeight(Protocol):
    """The base's parameters at one site, frozen."""

    @property
    def bias(self) -> Float[Tensor, " O"] | None:
        """The bias in the base's dtype; None if the module has none."""
        ...

    def blocks(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "N I"]]:
        """Yield the weight [O, I], dequantized, as blocks of its rows in order; a block's bytes bound N."""
        ...


class ReadBase(Protocol):
    """Runs a function of one site's weight where the base's memory may be read, and returns its result."""

    def __call__(self, function: Callable[[BaseWeight], T], /) -> T: ...


@dataclass(frozen=True, slots=True)
class Site:
    """One wrapped module. `name` is its module path in the base, `index` its row in the slot tables.

    read_base: the access to its weight, for methods that need it (DoRA); None if the base is only described.
    sublayer: "attention" or "mlp" if that sublayer adds the site's output to the residual stream, else "".
    layer: index of that sublayer's decoder layer; None if `sublayer` is "".
    norm: module path of the norm that opens the sublayer, whose input is the residual; "" if no norm has that place.
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
        """The last part of the path, as lists of `target_modules` spell it."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """The shape that an adapter must fit: a base's sites, the shape of its KV cache and the width of its embedding.

    digest: fingerprint of the weights and of how they are held: all that keys and values depend on.
    held_as: how the linear weights are held, such as "nf4".
    same_weights: for each digest that these weights have when held otherwise, how they are held then. An adapter that
        names one of these digests is served; one that names any other base is refused.
    rope_factors: the rotary factors that the base was fixed to if they depend on the longest request (model/rope.py),
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
        """Return the sites of these kinds, in order."""
        return [site for site in self.sites.values() if site.kind in kinds]

    def read_through(self, run: Callable[[Callable[[], Any]], Any]) -> "BaseShape":
        """Return the same base with its weights read through `run`, which may switch to the thread that may read."""

        def route(read_base: ReadBase, function: Callable[[BaseWeight], Any], /) -> Any:
            return run(partial(read_base, function))

        sites = {
            name: site if site.read_base is None else replace(site, read_base=partial(route, site.read_base))
            for name, site in self.sites.items()
        }
        return replace(self, sites=sites)


Drop = Callable[[Tensor], Tensor]  # dropout, as training draws it


def keep(tensor: Tensor) -> Tensor:
    """Drop nothing, as in evaluation and serving."""
    return tensor


def require_dropout(share: float) -> None:
    """Raise ValueError unless dropout can drop this share."""
    if not 0 <= share < 1:
        raise ValueError(f"dropout: must be at least 0 and below 1, given {share}")


class DeltaKind(IntEnum):
    """The operation of one of a slot's table rows at a site, as kernels read it (the `kind` column of the table)."""

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
        """Whether the operation needs the residual stream that entered the site's sublayer."""
        return self in (DeltaKind.BOTTLENECK_SUM, DeltaKind.BOTTLENECK_RESIDUAL)


class Packed(NamedTuple):
    """One kind of delta of one adapter at one site, as slots store it: contiguous, in the kernels' layout.

    first, second: defined by `kind` (kernels/cpu/deltas.py has the table); `second` is None if the kind has one tensor.
    """

    kind: DeltaKind
    rank: int
    first: Tensor
    second: Tensor | None


class VirtualKV(NamedTuple):
    """Keys and values of `P` virtual positions, in every layer; keys are not rotated."""

    keys: Float[Tensor, "L P H D"]
    values: Float[Tensor, "L P H D"]

    @property
    def num_positions(self) -> int:
        return self.keys.shape[1]


class SoftRows(NamedTuple):
    """Inputs of the first layer at `P` virtual positions; the base makes keys and values from them, rotated as usual.

    They enter behind the embedding module: a base that scales inside that module (Gemma) does not scale them.
    """

    rows: Float[Tensor, "P E"]

    @property
    def num_positions(self) -> int:
        return self.rows.shape[0]


Virtual = VirtualKV | SoftRows


def tensor_norms(params: Any) -> Mapping[str, float]:
    """Return the norm of every parameter tensor by its field, for methods that report no better measure."""
    return {
        f"‖{name}‖": value.float().norm().item() for name, value in params._asdict().items() if torch.is_tensor(value)
    }


class MethodConfig(Protocol):
    """A method's settings: a frozen dataclass whose fields are the keys of a recipe."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class Fitted(NamedTuple):
    """An adapter's config, its parameters by site, and those of its virtual positions."""

    config: Any
    sites: Mapping[str, Any] = {}
    prefix: Any = None


class Format(NamedTuple):
    """One of the formats in which PEFT writes a method's adapters.

    peft_type, schema: its name in adapter_config.json, and the values that the other keys may have.
    read: check a file's tensors, and its config, which has passed the schema. Raises InvalidAdapter.
    switch: a key of the config that is true in this format, if others have the same peft_type.
    """

    peft_type: str
    schema: Schema
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], BaseShape, AdapterLimits], Fitted]
    switch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One PEFT method: its name, its settings, its pure functions and its files. `Any` is its own parameter NamedTuple.

    usual: its default config, whose type is the method's. fit(usual, base) names its modules as the base does. Raises
        ValueError for a base that has none of them.
    begin(config, base, generator) makes an untrained adapter with a resolved config: `target_modules` are all that it
        touches, `layers` and `exclude` are worked in. Raises ValueError for a setting that means nothing on the base,
        and InvalidAdapter if a bottleneck has no place.
    formats, write: the formats that are read, and the function that writes the first of them: its config's keys and its
        tensors.
    pack(params, dtype) lays one site's parameters out for slots, as one or more kinds of delta whose sum is the
        method's; unpack is its inverse, as views.
    virtual(params) returns the virtual positions of a method that adds some.
    rank(params) is one site's rank; 0 for methods without one.
    count(config, sites, base) is the number of parameters that a config trains at these sites, as a formula.
    norms(params) measures how far parameters are from adding nothing: Frobenius norms, by the name of each measure.
    reads_residual(params) says whether `after` needs r at that site; if it does not, r may be None.
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
        """Return every parameter tensor, in a fixed order."""
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
        """The tokens from which on the adapter acts (methods/activation.py); () if it acts everywhere."""
        return getattr(self.config, "invocation_tokens", ())

    @property
    def rank(self) -> int:
        """The largest rank at any site; 0 for methods without one."""
        return max(map(self.method.rank, self.sites.values()), default=0)
