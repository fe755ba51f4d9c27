"""Resource estimate of a run: `weft train --dry-run`, which trains nothing and writes nothing."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from weft_training import data
from weft_training.base import num_parameters
from weft_training.config import Optimizer, TrainConfig, optimizer_on
from weft_training.data import Row
from weft_training.recompute import recomputing
from weft_training.run import Prepared
from weft_training.trained import TrainedModel

_FLOAT32 = 4
# bitsandbytes' 8-bit AdamW: smaller tensors keep their moments in float32, larger ones need a scale for each block.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256
# Full fine-tuning with AdamW in mixed precision, per parameter: weight and gradient in 16 bits; master weight and two
# moments in float32.
_FULL_FINE_TUNING = 2 + 2 + 3 * _FLOAT32


class Plan(NamedTuple):
    """Sizes of a run.

    num_adapter: parameters of what is written. num_trained: what the optimizer updates, a reparameterization's if there
        is one; adapter, gradients and optimizer state are of these.
    activation_bytes: what autograd keeps of the widest pass; measured with one forward pass over the longest examples.
    """

    num_base: int
    num_adapter: int
    num_trained: int
    num_rows: int
    num_tokens: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def efficiency_ratio(self) -> float:
        """Ratio d / k: the base's parameters over the adapter's (owner's section 1.1)."""
        return self.num_base / self.num_adapter

    @property
    def full_fine_tuning_bytes(self) -> int:
        """Bytes of AdamW in mixed precision that trains the whole base: 16 B a parameter, no activations."""
        return self.num_base * _FULL_FINE_TUNING

    @property
    def memory_ratio(self) -> float:
        """Full fine-tuning's bytes over this run's, activations left out of both."""
        return self.full_fine_tuning_bytes / (self.total_bytes - self.activation_bytes)

    @property
    def total_bytes(self) -> int:
        sizes = (self.base_bytes, self.adapter_bytes, self.gradient_bytes, self.optimizer_bytes, self.activation_bytes)
        return sum(sizes)


def make(config: TrainConfig, prepared: Prepared) -> Plan:
    """Plan a run that `prepare` made ready."""
    model = prepared.model
    trained = list(model.parameters())
    num_trained = sum(parameter.numel() for parameter in trained)
    optimizer = optimizer_on(model.device.type, config)
    stored = _storages([*model.base.model.parameters(), *model.base.model.buffers(), *_quantization(model)])
    per_pass = max(1, config.batch_size // config.accumulation_steps)
    longest = sorted(prepared.rows, key=lambda row: -len(row.input_ids))[:per_pass]
    return Plan(
        num_base=num_parameters(model.base),
        num_adapter=model.num_trained,
        num_trained=num_trained,
        num_rows=len(prepared.rows),
        num_tokens=sum(len(row.input_ids) for row in prepared.rows),
        base_bytes=sum(stored.values()),
        adapter_bytes=num_trained * _FLOAT32,
        gradient_bytes=num_trained * _FLOAT32,
        optimizer_bytes=sum(2 * _moment_bytes(parameter, optimizer) for parameter in trained),
        activation_bytes=_activation_bytes(config, model, longest, stored),
    )


def _moment_bytes(parameter: Tensor, optimizer: Optimizer) -> int:
    """Return the bytes of one of AdamW's two moments of a tensor."""
    size = parameter.numel()
    if optimizer == Optimizer.ADAMW or size < _SMALLEST_8BIT:
        return size * _FLOAT32
    return size + math.ceil(size / _BLOCK_8BIT) * _FLOAT32


def _quantization(model: TrainedModel) -> list[Tensor]:
    """Return the scales of bitsandbytes' 4-bit weights, which are not parameters."""
    found = (getattr(parameter, "quant_state", None) for parameter in model.base.model.parameters())
    states = [state for state in found if state is not None]
    nested = [state.state2.absmax for state in states if state.nested]  # of double quantization
    return [*(state.absmax for state in states), *nested]


def _activation_bytes(config: TrainConfig, model: TrainedModel, rows: list[Row], stored: dict[int, int]) -> int:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    batch = {name: tensor.to(model.device) for name, tensor in data.collate(rows, pad_token_id=0).items()}
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=config.autocast)
    recomputed = recomputing(model) if config.gradient_checkpointing else nullcontext()
    with recomputed, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    own = _storages(model.parameters())
    found = {where: size for where, size in _storages(kept).items() if where not in stored and where not in own}
    del loss
    return sum(found.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return bytes by storage, so that views of one tensor count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
