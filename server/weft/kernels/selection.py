"""Which implementation computes the deltas and attention on a device.

Kernels are faster equals of the reference (methods/driver.py, model/paged_attention.py); where none exists for a device,
the reference itself runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weft.methods.inject import Driver


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """name: for logs and build info. driver: makes a step's driver from (slot table, offsets, slots, gates); None for the
    reference driver. attend: paged attention."""

    name: str
    driver: Callable[[Any, Tensor, Tensor, Tensor], Driver] | None
    attend: Callable[..., Tensor]
