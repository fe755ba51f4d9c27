"""Adapters with weights on the trainer's own model, for measurements; serving has its own way (`weft generate`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import Adapter
from weft.model.loader import Base


class WeightedModel:
    """Base with out = y + Σ weight · delta on every row. The adapters act at modules."""

    def __init__(self, base: Base, parts: Sequence[tuple[Adapter, float]]) -> None:
        self._base = base
        self._driver = ReferenceDriver(
            [
                # One gate for all rows: [1] broadcasts over them.
                Segment(adapter.method, adapter.sites, gates=torch.tensor([weight], device=base.device))
                for adapter, weight in parts
            ]
        )

    @property
    def device(self) -> torch.device:
        return self._base.device

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Return prompts [B, T], padded on the left, with continuations [B, T + N]; the options are transformers'."""
        with self._base.context.use(self._driver):
            return self._base.model.generate(input_ids, attention_mask=attention_mask, **options)
