"""Paged keys and values, and the attention function that is given to transformers.

One step is one flattened sequence [1, T]; which rows belong to which request travels as one argument, `paged`, that
transformers hands through to the attention function. No mask is ever built.

A request's *block table* lists its blocks in order. The first ceil(P / block_size) blocks hold its P virtual positions
(prefix, prompt), shared by every request of it, the rest its real tokens. In the logical cache, index j < P is
a virtual position, P ≤ j < Ppad (the next multiple of block_size) is a hole that is never read, and real token n sits
at Ppad + n. Positions count without the hole: p(virtual j) = j, p(real n) = P + n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "weft_paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """One pair of tensors per layer, each [num_blocks, block_size, H, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Zeroed pools."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        keys = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        values = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        return cls(keys=keys, values=values)

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    def slots(self, blocks: list[int], num_tokens: int) -> Tensor:
        """Where the first `num_tokens` tokens of `blocks` are stored: int64 [num_tokens]."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        slots = index[:, None] * self.block_size + torch.arange(self.block_size, device=index.device)
        return slots.reshape(-1)[:num_tokens]

    def is_finite(self, slots: Tensor) -> bool:
        """Whether every layer's keys and values in `slots` are numbers."""
        return all(bool(t.flatten(0, 1)[slots].isfinite().all()) for t in (*self.keys, *self.values))

    def write_virtual(self, blocks: list[int], keys: Tensor, values: Tensor) -> None:
        """Store virtual positions, keys and values [L, P, H, D], in `blocks`."""
        slots = self.slots(blocks, keys.shape[1])
        for layer, (layer_keys, layer_values) in enumerate(zip(self.keys, self.values, strict=True)):
            layer_keys.flatten(0, 1)[slots] = keys[layer].to(layer_keys)
            layer_values.flatten(0, 1)[slots] = values[layer].to(layer_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Which rows of the step belong to whom, and where their keys and values live."""

    cache: KVCache
    kv_slots: Tensor  # int64 [T]: block · block_size + offset that each row's key and value are stored at
    query_start: Tensor  # int32 [B + 1]: rows query_start[b] : query_start[b + 1] are request b's
    context_lens: Tensor  # int32 [B]: real tokens of the request in the cache after this step
    virtual_lens: Tensor  # int32 [B]: P
    block_tables: Tensor  # int32 [B, max blocks]


# Stores the step's keys and values in one layer and attends.
# (batch, layer, query [T, Hq, D], key [T, H, D], value [T, H, D], scale, window or 0, softcap or 0) -> [T, Hq, D]
Attend = Callable[[PagedBatch, int, Tensor, Tensor, Tensor, float, int, float], Tensor]


def attend_reference(
    batch: PagedBatch,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """The textbook, one request at a time: softmax(scale · Q Kᵀ) V over what each query may see, in float32 at least."""
    block_size = batch.cache.block_size
    keys, values = batch.cache.keys[layer].flatten(0, 1), batch.cache.values[layer].flatten(0, 1)  # [slots, H, D]
    keys[batch.kv_slots] = key
    values[batch.kv_slots] = value
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    starts, contexts, virtuals = (t.tolist() for t in (batch.query_start, batch.context_lens, batch.virtual_lens))
    for b, (num_real, num_virtual) in enumerate(zip(contexts, virtuals, strict=True)):
        rows = slice(starts[b], starts[b + 1])
        num_rows = rows.stop - rows.start
        padded = -(-num_virtual // block_size) * block_size
        device = query.device
        logical = torch.cat([torch.arange(num_virtual), padded + torch.arange(num_real)]).to(device)  # [K]
        slots = batch.block_tables[b].long()[logical // block_size] * block_size + logical % block_size
        q = query[rows].to(wide).transpose(0, 1)  # [Hq, N, D]
        groups = query.shape[1] // keys.shape[1]
        k = keys[slots].to(wide).transpose(0, 1).repeat_interleave(groups, 0)  # [Hq, K, D]
        v = values[slots].to(wide).transpose(0, 1).repeat_interleave(groups, 0)
        scores = q @ k.mT * scale  # [Hq, N, K]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        key_position = torch.arange(num_virtual + num_real, device=device)
        query_position = num_virtual + num_real - num_rows + torch.arange(num_rows, device=device)
        distance = query_position[:, None] - key_position[None, :]  # [N, K]
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out


@dataclass(frozen=True, slots=True)
class Paged:
    """What a step hands through the model: its batch and how this device attends."""

    batch: PagedBatch
    attend: Attend


def register() -> None:
    """Make ATTENTION known to transformers; it registers no mask, so none is built."""
    AttentionInterface.register(ATTENTION, _forward)


def _forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, H, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Paged,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not served")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = paged.attend(
        paged.batch,
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None  # [1, T, Hq, D]
