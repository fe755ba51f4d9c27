"""Optimize a loaded base for serving: the same numbers, laid out and computed faster.

For a trainer a base stays as it was loaded, because nothing here carries a gradient.
"""

from collections.abc import Callable

from weft.kernels.selection import Kernels
from weft.model import elementwise, groups, nf4_linear, packed
from weft.model.loader import Base

Part = Callable[[Base], object]
"""One change to a base, in place."""


def take(base: Base, kernels: Kernels, *, shadow_bytes: int = 0) -> None:
    """Change `base` in place; its sites keep their names, and their weights can be read as before.

    shadow_bytes: budget for 16-bit copies of NF4 weights (model/nf4_linear.py).
    """
    for part in parts(kernels, shadow_bytes=shadow_bytes).values():
        part(base)


def parts(kernels: Kernels, *, shadow_bytes: int = 0) -> dict[str, Part]:
    """Return `take`'s changes for these kernels, by name and in order; each is right without the earlier ones."""
    found: dict[str, Part] = {}
    nf4, rms_norm, gate = kernels.nf4, kernels.rms_norm, kernels.gate
    if nf4 is not None:  # before groups: scales that are quantized themselves cannot be joined
        found["scales"] = lambda base: nf4_linear.expand_scales(base.model)
    found["groups"] = lambda base: groups.fuse(base.model, base.context)
    found["packing"] = lambda base: packed.pack(base.model)
    if nf4 is not None:
        found["nf4"] = lambda base: nf4_linear.replace(base.model, nf4, shadow_bytes=shadow_bytes)
    if rms_norm is not None:
        found["norms"] = lambda base: elementwise.fuse_norms(base.model, rms_norm)
    if gate is not None:
        found["gates"] = lambda base: elementwise.fuse_gates(base.model, gate)
    return found
