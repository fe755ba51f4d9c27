"""What every router kernel reads of a step's mixtures, on the device that it runs on.

Shapes: R runs of rows, T tokens in the batch, S spans of virtual positions, N entries, L layers, G gates of a layer's
trace.
"""

from typing import Protocol

from torch import Tensor


class RoutedRows(Protocol):
    """Which gates of a step are experts', and where what is made of them goes."""

    @property
    def table(self) -> Tensor:
        """int64 [R, 6], rising: first row, one past the last, slot, address of float32 [3, experts] (allowed, floor,
        ceiling) or 0, address of float32 [hidden] that is read instead of the rows or 0, where in a layer's trace the
        gates go or -1. What has an address is on the device too."""
        ...

    @property
    def experts(self) -> Tensor:
        """int32 [N]: which expert an entry is, or -1 where its gate stays."""
        ...

    @property
    def span_experts(self) -> Tensor | None:
        """int32 [T, S]: which expert a row's span of virtual positions is of, or -1."""
        ...

    @property
    def log_gates(self) -> Tensor | None:
        """float32 [T, S]: where the logarithms of those experts' gates go."""
        ...

    @property
    def trace(self) -> Tensor | None:
        """float32 [L, G]."""
        ...
