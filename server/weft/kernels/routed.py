"""What every router kernel reads of a step's mixtures, on whatever device.

Shapes: T tokens in the batch, S spans of virtual positions, N entries, L layers, G gates of a layer's trace.
"""

from typing import Protocol

from torch import Tensor


class RoutedRows(Protocol):
    """Which gates of a step are experts', and where what is made of them goes."""

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
