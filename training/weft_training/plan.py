"""What a run would need: `weft train --dry-run`, which trains nothing and writes nothing."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from weft_training import data
from weft_training.config import Optimizer, TrainConfig, optimizer_on
from weft_training.data import Row
from weft_training.recompute import recomputing
from weft_training.trained import TrainedModel
from weft_training.trainer import Prepared

_FLOAT32 = 4
_MOMENT_BYTES = {Optimizer.ADAMW: _FLOAT32, Optimizer.PAGED_ADAMW_8BIT: 1}


class Plan(NamedTuple):
    """Sizes of a run. The ratio is the owner's efficiency ratio, N_total / N_trainable, without and with the adapter.

    activation_bytes: what autograd keeps of the widest pass; measured, with one forward pass over the longest examples.
    """

    num_base: int
    num_trainable: int
    num_rows: int
    num_tokens: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def efficiency_ratio(self) -> float:
        """N_total / N_trainable, the base's parameters and the adapter's over the adapter's."""
        return (self.num_base + self.num_trainable) / self.num_trainable

    @property
    def total_bytes(self) -> int:
        sizes = (self.base_bytes, self.adapter_bytes, self.gradient_bytes, self.optimizer_bytes, self.activation_bytes)
        return sum(sizes)


def make(config: TrainConfig, prepared: Prepared) -> Plan:
    """The plan of a run that `prepare` made ready. AdamW keeps two moments per parameter, in float32 or in 8 bits."""
    model = prepared.model
    num_trainable = model.num_trained
    stored = _storages([*model.base.model.parameters(), *model.base.model.buffers(), *_quantization(model)])
    per_pass = max(1, config.batch_size // config.accumulation_steps)
    longest = sorted(prepared.rows, key=lambda row: -len(row.input_ids))[:per_pass]
    return Plan(
        num_base=_count(model),
        num_trainable=num_trainable,
        num_rows=len(prepared.rows),
        num_tokens=sum(len(row.input_ids) for row in prepared.rows),
        base_bytes=sum(stored.values()),
        adapter_bytes=num_trainable * _FLOAT32,
        gradient_bytes=num_trainable * _FLOAT32,
        optimizer_bytes=2 * num_trainable * _MOMENT_BYTES[optimizer_on(model.device.type, config)],
        activation_bytes=_activation_bytes(config, model, longest, stored),
    )


def _count(model: TrainedModel) -> int:
    """Parameters of the base as it was trained: a quantized weight counts as many as the matrix it stands for."""
    total = 0
    for parameter in model.base.model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else math.prod(state.shape)
    return total


def _quantization(model: TrainedModel) -> list[Tensor]:
    """The scales of bitsandbytes' 4-bit weights, which are no parameters."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.base.model.parameters())
    return [state.absmax for state in states if state is not None]


def _activation_bytes(config: TrainConfig, model: TrainedModel, rows: list[Row], stored: dict[int, int]) -> int:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    batch = {name: tensor.to(model.device) for name, tensor in data.collate(rows, pad_token_id=0).items()}
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=config.autocast)
    if config.gradient_checkpointing:
        with recomputing(model), autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
    else:
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
    own = _storages(model.parameters())
    found = {where: size for where, size in _storages(kept).items() if where not in stored and where not in own}
    del loss
    return sum(found.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by place, so that views of one tensor count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
