"""How a loaded base is held to serve: every rearrangement of its modules, in the one order that works."""

from weft.kernels.selection import Kernels
from weft.model import elementwise, groups, packed
from weft.model.loader import Base


def prepare(base: Base, kernels: Kernels) -> None:
    """Hold the base as it serves best with these kernels, in place."""
    groups.fuse(base.model, base.context)
    packed.pack(base.model)
    elementwise.fuse(base.model, kernels)
