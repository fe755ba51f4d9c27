"""Training of adapters that act from an invocation on (weft/methods/activation.py): serving's gates, for whole rows.

    gate[b, t] = 1 on the last `counts[b]` tokens of row b, 0 before

The invocation is searched for only in tokens that are not learned, just as serving searches only the prompt. Counting
from the end also fits a generation step, in which each row's one token is its last.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weft.methods import activation
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Site
from weft_training.data import IGNORED, InvalidData, Row

_NO_TOKEN = -1


class ActivatedDriver(Driver):
    """Reference driver for one adapter that acts on the ends of the rows of a batch [B, T]."""

    def __init__(self, segment: Segment, counts: Tensor) -> None:
        self._segment = segment
        self._counts = counts  # int64 [B]
        self._drivers: dict[int, ReferenceDriver] = {}  # by T

    @property
    def needs_residual(self) -> bool:
        """Whether the adapter reads the residual stream anywhere."""
        return ReferenceDriver((self._segment,)).needs_residual

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the site's output for `x` [B, T, I]."""
        width = x.numel() // x.shape[-1] // len(self._counts)
        if width not in self._drivers:
            acts = torch.arange(width, device=x.device) >= width - self._counts.to(x.device)[:, None]  # [B, T]
            rows = acts.flatten().nonzero()[:, 0]
            self._drivers[width] = ReferenceDriver((self._segment._replace(rows=rows),))
        return self._drivers[width].apply(site, base, x, residual)


def counts(
    invocation: Sequence[int], input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Count the tokens of each row that the adapter acts on, int64 [B]; all given tensors are [B, T].

    0 for a row without the invocation. Tokens that are learned or masked are never part of an invocation.
    """
    ids = input_ids
    if attention_mask is not None:
        ids = ids.masked_fill(attention_mask == 0, _NO_TOKEN)
    if labels is not None:
        ids = ids.masked_fill(labels != IGNORED, _NO_TOKEN)
    begins = [activation.begin(invocation, row) for row in ids.tolist()]
    return torch.tensor([0 if begin is None else ids.shape[1] - begin for begin in begins])


def require_invoked(invocation: Sequence[int], rows: Sequence[Row]) -> None:
    """Raise InvalidData if a row lacks the invocation in its tokens that are not learned: it would teach nothing."""
    for index, row in enumerate(rows):
        given = [
            token if label == IGNORED else _NO_TOKEN for token, label in zip(row.input_ids, row.labels, strict=True)
        ]
        if activation.begin(invocation, given) is None:
            raise InvalidData(
                f"examples[{index}]: its prompt must hold the adapter's invocation_tokens {list(invocation)}, given "
                f"{row.input_ids[: row.num_prompt_tokens]}"
            )
