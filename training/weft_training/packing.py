"""Packing of several short examples into one row of the batch, so that no step is spent on padding.

Positions restart with every example, and transformers' masks separate examples at each restart (also in layers with a
sliding window). Not every model class does so; `require_apart` tests the base before training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft_training.data import IGNORED, Row


def pack(rows: Sequence[Row], max_length: int) -> list[tuple[Row, ...]]:
    """Group the rows by at most `max_length` tokens: first fit, longest first. The same rows give the same groups.

    First fit decreasing needs at most 11/9 of the fewest groups possible, plus 6/9 of one (Dósa 2007).
    """
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            groups.append([row])
            room.append(max_length - length)
        else:
            groups[place].append(row)
            room[place] -= length
    return [tuple(group) for group in groups]


def collate(groups: Sequence[Sequence[Row]], *, pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch, all [B, T]; padding is one more example, not learned. Positions take the place of a mask."""
    width = max(sum(len(row.input_ids) for row in group) for group in groups)
    shape = (len(groups), width)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for i, group in enumerate(groups):
        start = 0
        for row in group:
            end = start + len(row.input_ids)
            input_ids[i, start:end] = torch.tensor(row.input_ids)
            labels[i, start:end] = torch.tensor(row.labels)
            labels[i, start] = IGNORED  # no token of its own example precedes it
            position_ids[i, start:end] = torch.arange(end - start)
            start = end
        position_ids[i, start:] = torch.arange(width - start)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


@torch.no_grad()
def require_apart(model: Any) -> None:
    """Raise ValueError if `model` (a transformers causal LM) lets an example attend to the one before it in its row."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=model.device)[None] % 4
    other = ids.clone()
    other[0, :4] = ids[0, 4:]
    one, two = (
        model(input_ids=each, position_ids=positions, use_cache=False).logits[0, 4:].float() for each in (ids, other)
    )
    if not torch.equal(one, two):
        raise ValueError(
            f"packing: the attention of {type(model).__name__} lets examples of one row see each other "
            f"(logits differ by {(one - two).abs().max():.2g}); train without packing"
        )
