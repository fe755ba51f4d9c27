"""How a serving process holds its base: the same numbers as it was loaded, laid out and computed faster.

For a trainer a base stays as it was loaded: nothing here carries a gradient.
"""

from weft.kernels.selection import Kernels
from weft.model import elementwise, groups, nf4_linear, packed
from weft.model.loader import Base


def take(base: Base, kernels: Kernels, *, shadow_bytes: int = 0) -> None:
    """Change `base` in place; its sites keep their names, and their weights can be read as before.

    shadow_bytes: what 16-bit copies of NF4 weights may take (model/nf4_linear.py).
    """
    if kernels.nf4 is not None:
        nf4_linear.expand_scales(base.model)  # before groups: scales that are quantized themselves cannot be joined
    groups.fuse(base.model, base.context)
    packed.pack(base.model)
    if kernels.nf4 is not None:
        nf4_linear.replace(base.model, kernels.nf4, shadow_bytes=shadow_bytes)
    elementwise.fuse(base.model, kernels)
