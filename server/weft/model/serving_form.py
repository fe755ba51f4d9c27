"""How a serving process holds its base: the same numbers as it was loaded, laid out and computed faster.

For a trainer a base stays as it was loaded: nothing here carries a gradient.
"""

from weft.kernels.selection import Kernels
from weft.model import elementwise, groups, packed
from weft.model.loader import Base


def take(base: Base, kernels: Kernels) -> None:
    """Change `base` in place; its sites keep their names, and their weights can be read as before."""
    groups.fuse(base.model, base.context)
    packed.pack(base.model)
    elementwise.fuse(base.model, kernels)
