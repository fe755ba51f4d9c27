"""Paged keys and values, and the attention function that transformers calls.

One step is one flattened sequence [1, T]. Which rows belong to which request travels in one argument, `paged`, which
transformers passes on to the attention function. No mask is ever built.

A request's *block table* lists its blocks in order. First come its *spans*: each holds the virtual positions (prefix,
prompt) of one adapter, in blocks that every request of the adapter shares. Span s has P_s positions in ceil(P_s /
block_size) blocks; the rest of its last block is a hole that is never read. The real tokens begin at the block after
all spans. Positions count without the holes: p(span s, index j) = P_0 + … + P_{s-1} + j, p(real n) = ΣP + n.

A span of weight w counts w times in the softmax: the *log-gate* log w is added to its scores. Each row has its own
log-gate. At -inf the row does not see the span, whatever the span holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from weft.kernels.step import Paging
from weft.methods.protocol import BaseShape

ATTENTION = "weft_paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """One pair of tensors per layer, each [num_blocks, block_size, H, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls, base: BaseShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """Allocate zeroed pools for a base."""
        shape = (num_blocks, block_size, base.num_kv_heads, base.head_dim)
        pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * base.num_layers)]
        return cls(keys=tuple(pools[: base.num_layers]), values=tuple(pools[base.num_layers :]))

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    def slots(self, blocks: list[int], num_tokens: int) -> Tensor:
        """Return where the first `num_tokens` tokens of `blocks` are stored: int64 [num_tokens]."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        slots = index[:, None] * self.block_size + torch.arange(self.block_size, device=index.device)
        return slots.reshape(-1)[:num_tokens]

    def is_finite(self, slots: Tensor) -> bool:
        """Return whether every layer's keys and values in `slots` are finite."""
        found = [pool.flatten(0, 1)[slots].isfinite().all() for pool in (*self.keys, *self.values)]
        return bool(torch.stack(found).all())  # one read for all, because the host waits for the device here

    def write_virtual(self, blocks: list[int], keys: Tensor, values: Tensor) -> None:
        """Store virtual positions, keys and values [L, P, H, D], in `blocks`."""
        slots = self.slots(blocks, keys.shape[1])
        for layer, (layer_keys, layer_values) in enumerate(zip(self.keys, self.values, strict=True)):
            layer_keys.flatten(0, 1)[slots] = keys[layer].to(layer_keys)
            layer_values.flatten(0, 1)[slots] = values[layer].to(layer_values)


# Stores the step's keys and values in one layer and attends.
# (paging, layer, query [T, Hq, D], key [T, H, D], value [T, H, D], scale, window or 0, softcap or 0) -> [T, Hq, D]
Attend = Callable[[Paging, int, Tensor, Tensor, Tensor, float, int, float], Tensor]


class ReferenceAttend(NamedTuple):
    """The textbook formula, in float32 or wider: softmax(scale · Q Kᵀ + log-gates) V over what each query may see.

    pool_keys, pool_values: one tensor per layer, [num_blocks, block_size, H, D].
    """

    pool_keys: Sequence[Tensor]
    pool_values: Sequence[Tensor]

    def __call__(
        self,
        paging: Paging,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Store the step's keys and values in `layer`, and return the attention [T, Hq, D]."""
        pools = self.pool_keys[layer], self.pool_values[layer]
        block_size, device = pools[0].shape[1], query.device
        keys, values = (pool.flatten(0, 1) for pool in pools)  # [slots, H, D]
        keys[paging.kv_slots] = key
        values[paging.kv_slots] = value
        out = torch.empty(query.shape, dtype=query.dtype, device=device)
        wide, groups = torch.promote_types(query.dtype, torch.float32), query.shape[1] // keys.shape[1]
        starts = paging.query_start.tolist()
        for b, rows, seen in _sights(paging):
            # The real tokens come last.
            lengths = torch.cat([paging.virtual_lens[b], paging.context_lens[b, None]]).long()
            holes = -lengths % block_size
            span = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # of each key
            key_position = seen[span].nonzero()[:, 0]  # [K]
            span = span[key_position]
            logical = key_position + (holes.cumsum(0) - holes)[span]  # counts the holes before it
            slots = paging.block_tables[b].long()[logical // block_size] * block_size + logical % block_size
            q = query[rows].to(wide).transpose(0, 1)  # [Hq, N, D]
            k = keys[slots].to(wide).transpose(0, 1).repeat_interleave(groups, 0)  # [Hq, K, D]
            v = values[slots].to(wide).transpose(0, 1).repeat_interleave(groups, 0)
            scores = q @ k.mT * scale  # [Hq, N, K]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if paging.log_gates is not None:
                scores = scores + F.pad(paging.log_gates[rows].to(wide), (0, 1))[:, span]
            query_position = lengths.sum() + rows - starts[b + 1]
            distance = query_position[:, None] - key_position[None, :]  # [N, K]
            hidden = distance < 0
            if window:
                hidden |= distance >= window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[rows] = (weights @ v).transpose(0, 1).to(out.dtype)
        return out


def _sights(paging: Paging) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield rows of a request that see the same: (request, rows int64 [N], bool [S + 1] for spans and real tokens)."""
    num_spans, device = paging.virtual_lens.shape[1], paging.kv_slots.device
    for b, (first, end) in enumerate(pairwise(paging.query_start.tolist())):
        rows = torch.arange(first, end, device=device)
        if paging.log_gates is None:
            yield b, rows, torch.ones(num_spans + 1, dtype=torch.bool, device=device)
        elif first < end:
            is_seen = F.pad(paging.log_gates[rows] != float("-inf"), (0, 1), value=True)
            sights, sight_of_row = is_seen.unique(dim=0, return_inverse=True)
            for number, seen in enumerate(sights):
                yield b, rows[sight_of_row == number], seen


@dataclass(frozen=True, slots=True)
class Paged:
    """The argument that a step passes through the model: its paging, and how this device attends."""

    paging: Paging
    attend: Attend


def register() -> None:
    """Register ATTENTION with transformers, without a mask, so that none is built."""
    AttentionInterface.register(ATTENTION, _forward)


def _forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, H, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Paged | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if paged is None:
        raise TypeError("its layers do not hand what they do not know through to attention")
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not served")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = paged.attend(
        paged.paging,
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None  # [1, T, Hq, D]
