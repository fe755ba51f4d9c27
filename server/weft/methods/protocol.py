"""What a PEFT method is, and what it is fitted to.

Shape legend of the whole code base: `T` rows (tokens) of the flattened batch, `B` requests, `L` layers, `I`/`O` in and
out features of a site, `R` rank, `S` adapter slots, `H` heads, `D` head dim, `P` virtual positions, `N` entries.

A *site* is one wrapped linear module of the base. A method acts at a site through pure functions that return the delta,
never the sum:

    pre(params, x)         added to the input of the base weight:    x' = x + Σ gate · pre(x)
    post(params, x, y)     added to its output, y = W₀x':            out = y + Σ gate · post(x, y)
    after(params, y, r)    added to a sublayer's output y; r is the residual stream that entered the sublayer

Every delta sees the base output `y` and the input `x` as it was before any `pre`; never another adapter's work.
A method that has no site (prefix tuning) acts through *virtual positions*: keys and values before position 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """One wrapped linear module. `name` is its module path in the base, `index` its row in the slot tables.

    sublayer: "attention" or "mlp" where the site's output is what that sublayer adds to the residual stream, else "".
    layer: which decoder layer that is; None where `sublayer` is "".
    norm: module path of the norm that opens the sublayer, whose input is the residual; "" where no norm has that place.
    """

    index: int
    name: str
    in_features: int
    out_features: int
    sublayer: str = ""
    layer: int | None = None
    norm: str = ""

    @property
    def suffix(self) -> str:
        """The last part of the path, as `target_modules` lists name it."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """What an adapter must fit: the sites of a base and the shape of its KV cache.

    digest: fingerprint of weights and quantization; adapters bound to another base are refused.
    """

    sites: Mapping[str, Site]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    digest: str
    name: str


class DeltaKind(IntEnum):
    """What a plane of a slot does at a site, as the kernels know it (the `kind` column of a site's table)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One PEFT method: its name and its pure functions. `Any` is the method's own parameter NamedTuple.

    pack(params, dtype) lays one site's parameters out for slots, as one or more kinds of delta whose sum is the
        method's; unpack is its inverse, as views.
    virtual(params) gives the keys and values of a method that adds virtual positions.
    rank(params) is one site's rank; 0 for methods without one.
    reads_residual(params) says whether `after` needs r at that site; where it does not, r may be None.
    """

    name: str
    peft_type: str
    pre: Callable[[Any, Tensor], Tensor | None] | None = None
    post: Callable[[Any, Tensor, Tensor], Tensor | None] | None = None
    after: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    pack: Callable[[Any, torch.dtype], tuple[Packed, ...]] | None = None
    unpack: Callable[[tuple[Packed, ...]], Any] | None = None
    virtual: Callable[[Any], VirtualKV] | None = None
    rank: Callable[[Any], int] = lambda params: 0
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
        return 0 if self.method.virtual is None else self.method.virtual(self.prefix).keys.shape[1]

    @property
    def rank(self) -> int:
        """The largest rank at any site; 0 for methods without one."""
        return max(map(self.method.rank, self.sites.values()), default=0)
