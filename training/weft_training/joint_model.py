"""Many adapters on one frozen base in one forward pass, each on its own rows.

Legend beyond weft/methods/protocol.py: a *share* is one adapter's part of a step. The shares' rows are stacked into one
batch [B, T]; flattened, a share's rows are the B_k · T rows of one span.

Shares do not affect each other: a row attends to itself and to its own adapter's virtual positions, and a delta is
added to its own span. So the gradient of the summed losses with respect to one adapter is that of its own loss.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.inject import Driver
from weft.methods.protocol import Method, Site
from weft.model.loader import Base
from weft_training.adapter import AdaptedModel


class Share(NamedTuple):
    """An adapter and its batch in this step.

    batch: input_ids, attention_mask and labels, each [B_k, T_k], as `data.collate` makes them.
    num_items: divisor of the summed token losses; None is the number of learned tokens.
    """

    model: AdaptedModel
    batch: Mapping[str, Tensor]
    num_items: Tensor | int | None = None

    @property
    def num_rows(self) -> int:
        return self.batch["input_ids"].shape[0]

    @property
    def width(self) -> int:
        return self.batch["input_ids"].shape[1]


@dataclass(frozen=True, slots=True)
class SpanDriver(Driver):
    """Reference driver for adjacent spans that begin at row 0 and cover all rows.

    Semantics: those of ReferenceDriver with `segments` whose rows are these spans, gates 1. One concatenation replaces
        an addition to all rows for each segment, in the backward pass too.
    segments: one for each span; their `rows` are ignored. sizes: the rows of each, summing to T.
    """

    segments: Sequence[Segment]
    sizes: Sequence[int]

    @property
    def needs_residual(self) -> bool:
        """Whether any segment reads the residual stream anywhere."""
        return ReferenceDriver(self.segments).needs_residual

    def apply(self, site: Site, base: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the site's output for `x` [..., I]; leading dimensions flatten to the rows. Inputs stay unchanged."""
        if not any(site.name in segment.params for segment in self.segments):
            return base(x)
        here = [(segment.method, segment.params.get(site.name)) for segment in self.segments]
        rows, spans = self._split(x)
        y = base(_sum(rows, spans, [_pre(*of, span) for of, span in zip(here, spans, strict=True)]).view_as(x))
        y_rows, y_spans = self._split(y)
        r_spans = [None] * len(spans) if residual is None else self._split(residual)[1]
        parts = zip(here, spans, y_spans, r_spans, strict=True)
        added = [_post(*of, span, y_span, r_span) for of, span, y_span, r_span in parts]
        return _sum(y_rows, y_spans, added).view_as(y)

    def _split(self, tensor: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the rows [T, F], and the span of each segment."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows, rows.split(list(self.sizes))


def _pre(method: Method, params: Any, x: Tensor) -> Tensor | None:
    return None if params is None or method.pre is None else method.pre(params, x)


def _post(method: Method, params: Any, x: Tensor, y: Tensor, r: Tensor | None) -> Tensor | None:
    """Return what a method adds to the output; it has `post` or `after`, never both."""
    if params is None:
        return None
    if method.after is not None:
        return method.after(params, y, r)
    return None if method.post is None else method.post(params, x, y)


def _sum(rows: Tensor, spans: Sequence[Tensor], deltas: Sequence[Tensor | None]) -> Tensor:
    """Return `rows` with the deltas of its `spans`, or `rows` itself if there are none."""
    if all(delta is None for delta in deltas):
        return rows
    parts = [span if delta is None else span + delta for span, delta in zip(spans, deltas, strict=True)]
    return torch.cat(parts)


def losses(base: Base, shares: Sequence[Share]) -> list[Tensor]:
    """Return the loss of each share from one forward pass; each is that of `share.model` on its batch alone.

    Gradients flow to every share's adapter, and never from one share to another's.
    """
    width = max(share.width for share in shares)
    num_virtual = max(share.model.num_virtual_tokens for share in shares)
    input_ids, masks, positions = [], [], []
    for share in shares:
        own = share.model.num_virtual_tokens
        padding = (0, width - share.width)
        input_ids.append(F.pad(share.batch["input_ids"], padding))
        # A share's virtual positions end where its tokens begin, as they do alone, because sliding windows depend on
        # the distance.
        mask = F.pad(share.batch["attention_mask"], (own, 0), value=1)
        masks.append(F.pad(mask, (num_virtual - own, padding[1])))
        # Only padding lies beyond the base's last position, but GPT-2 would look its embedding up all the same.
        position = torch.arange(own, own + width).clamp(max=base.max_model_len - 1)
        positions.append(position.expand(share.num_rows, -1))
    driver = SpanDriver(
        [Segment(share.model.adapter.method, share.model.adapter.sites) for share in shares],
        [share.num_rows * width for share in shares],
    )
    past = _past(base, shares, num_virtual) if num_virtual else None
    with base.context.use(driver):
        logits = base.model(
            input_ids=torch.cat(input_ids).to(base.device),
            attention_mask=torch.cat(masks).to(base.device),
            position_ids=torch.cat(positions).to(base.device),
            past_key_values=past,
            use_cache=past is not None,
        ).logits
    rows = logits.split([share.num_rows for share in shares])
    return [_loss(base, share, own[:, : share.width]) for share, own in zip(shares, rows, strict=True)]


def _loss(base: Base, share: Share, logits: Tensor) -> Tensor:
    """Compute the loss from labels as the base's own forward pass does. logits: [B_k, T_k, V]."""
    labels = share.batch["labels"].to(logits.device)
    options: dict[str, Any] = {} if share.num_items is None else {"num_items_in_batch": share.num_items}
    return base.model.loss_function(logits=logits.contiguous(), labels=labels, vocab_size=base.vocab_size, **options)


def _past(base: Base, shares: Iterable[Share], num_virtual: int) -> DynamicCache:
    """Return each row's virtual positions at the end of `num_virtual` slots; the mask hides the slots before."""
    caches = [(share.num_rows, share.model.past(share.num_rows)) for share in shares]
    shape = (base.shape.num_kv_heads, num_virtual, base.shape.head_dim)
    merged = DynamicCache()
    for layer in range(base.shape.num_layers):
        keys, values = [], []
        for num_rows, cache in caches:
            if cache is None:
                keys.append(torch.zeros(num_rows, *shape, dtype=base.dtype, device=base.device))
                values.append(keys[-1])
            else:
                own: Any = cache.layers[layer]  # typed as any kind of layer; `past` makes the kind that has keys
                padding = (0, 0, num_virtual - own.keys.shape[2], 0)
                keys.append(F.pad(own.keys, padding))
                values.append(F.pad(own.values, padding))
        merged.update(torch.cat(keys), torch.cat(values), layer)  # [B, H, P, D]
    return merged
