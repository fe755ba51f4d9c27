"""Steps of which a kernel reads a part: the rest is absent."""

import torch
from torch import Tensor

from weft.kernels.step import Entries, Paging, Routing, Step


def step_of(entries: Entries, routing: Routing | None = None, log_gates: Tensor | None = None) -> Step:
    """Return a step with these entries alone."""
    nothing = torch.empty(0)
    paging = Paging(nothing, nothing, nothing, nothing, nothing, log_gates)
    return Step(nothing, nothing, nothing, paging, entries, routing)
