"""Attention over a paged KV cache on the CPU: decode and chunked prefill in one call.

Shapes: T query tokens in the batch, B requests, Hq query heads, Hkv KV heads (Hq is a multiple of it), D head size, at
most S spans of virtual positions per request, P positions in all spans of a request. A query row's bits depend on its
own query, keys and log-gates alone: not on the other requests, T, B, S, the width of the block table, the block size,
the number of threads, or how its prompt was cut into chunks.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.cpu import library
from weft.kernels.step import Paging, shown

_DTYPES = (torch.float32, torch.bfloat16)
_HEAD_SIZE_MAX = 256
_pack_store = struct.Struct("=16q").pack  # StoreCall in paged_cache.h
_pack_attend = struct.Struct("=9q2d15q").pack  # AttendCall in attention_plan.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The paged keys and values of one layer. Made once; `store` writes them.

    keys, values: [num_blocks, block_size, Hkv, D], contiguous, both float32 or both bfloat16; D is a multiple of 8 up
      to 256, and one that is a multiple of 32 saves copies.
    """

    keys: Tensor
    values: Tensor
    packed: tuple[int, ...] = field(init=False, repr=False, compare=False)  # Cache in paged_cache.h

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        for name, given in (("keys", keys), ("values", values)):
            if given.dim() != 4 or given.dtype not in _DTYPES or not given.is_cpu or not given.is_contiguous():
                raise ValueError(
                    f"{name}: needs contiguous [num_blocks, block_size, Hkv, D] float32 or bfloat16 on the CPU, "
                    f"given {shown(given)}"
                )
        if keys.shape != values.shape or keys.dtype is not values.dtype:
            raise ValueError(f"values: needs the shape and dtype of keys, {shown(keys)}, given {shown(values)}")
        if keys.numel() == 0 or keys.shape[3] % 8 or keys.shape[3] > _HEAD_SIZE_MAX:
            raise ValueError(
                f"keys: needs D a multiple of 8 up to {_HEAD_SIZE_MAX} and no empty dimension, given {shown(keys)}"
            )
        object.__setattr__(self, "packed", (keys.data_ptr(), values.data_ptr(), *keys.shape))


class Packed(NamedTuple):
    """A step's paging, checked once, and its record for the kernels (Paging in attention_plan.h)."""

    paging: Paging
    numbers: tuple[int, ...]


def pack(paging: Paging) -> Packed:
    """Check the paging of a step on the CPU. Raises ValueError naming the argument that does not fit."""
    _, query_start, context_lens, virtual_lens, block_tables, log_gates = paging
    num_requests = context_lens.shape[0] if context_lens.dim() else 0
    num_spans = virtual_lens.shape[-1] if virtual_lens.dim() else 0
    width = block_tables.shape[-1] if block_tables.dim() else 0
    _check_metadata("query_start", query_start, (num_requests + 1,))
    _check_metadata("context_lens", context_lens, (num_requests,))
    _check_metadata("virtual_lens", virtual_lens, (num_requests, num_spans))
    _check_metadata("block_tables", block_tables, (num_requests, width))
    pointers = [tensor.data_ptr() for tensor in (query_start, context_lens, virtual_lens, block_tables)]
    num_gate_rows = gates_at = 0
    if log_gates is not None and num_spans:
        num_gate_rows = log_gates.shape[0] if log_gates.dim() else 0
        _check_metadata("log_gates", log_gates, (num_gate_rows, num_spans), torch.float32)
        gates_at = log_gates.data_ptr()
    return Packed(paging, (*pointers, gates_at, num_requests, width, num_spans, num_gate_rows))


def store(key: Tensor, value: Tensor, cache: Cache, kv_slots: Tensor) -> None:
    """Write the new keys and values into the cache, in place.

    Semantics: cache.keys.view(-1, Hkv, D)[kv_slots[t]] = key[t], and the values likewise; no slot may occur twice.

    key, value: [T, Hkv, D] of the cache's dtype, any token and head strides, D contiguous.
    kv_slots: [T] int64, contiguous; block * block_size + offset.
    """
    num_tokens = key.shape[0]
    _, _, _, _, kv_heads, head_size = cache.packed
    key_strides = _check_heads("key", key, (num_tokens, kv_heads, head_size), cache)
    value_strides = _check_heads("value", value, (num_tokens, kv_heads, head_size), cache)
    if kv_slots.dtype is not torch.int64 or kv_slots.shape != (num_tokens,) or not kv_slots.is_contiguous():
        raise ValueError(f"kv_slots: needs contiguous [{num_tokens}] int64, given {shown(kv_slots)}")
    library.run(
        "weft_store",
        _pack_store(
            key.data_ptr(), value.data_ptr(), key_strides[0], key_strides[1], value_strides[0], value_strides[1],
            num_tokens, key.dtype is torch.bfloat16, torch.get_num_threads(), kv_slots.data_ptr(), *cache.packed,
        ),
        cache,
        kv_slots,
    )  # fmt: skip


def attend(
    query: Tensor, cache: Cache, packed: Packed, out: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
) -> None:
    """Write the attention of each query row over its request's stored keys to `out`, in place.

    Semantics: with s(q, k) = scale * (q . k), or softcap * tanh(scale * (q . k) / softcap) if softcap is not 0,
      plus log_gates[t, i] if k is in span i,
      out[t, h] = sum over visible k of softmax(s(query[t, h], .))[k] * value[k], in float32, rounded once;
      query head h reads KV head h // (Hq / Hkv). The query at real index n sees every virtual position and the real
      tokens 0 .. n; with a window, only those of them less than `window` positions back, where virtual position j
      of a span is at j + the lengths of the spans before it, and real token n at P + n.
    This step's keys must be stored before.

    query: [T, Hq, D] of the cache's dtype, any token and head strides, D contiguous.
    out: [T, Hq, D] of the same dtype, contiguous, sharing no memory with query.
    """
    num_tokens, query_heads = query.shape[0], query.shape[1]
    _, _, _, _, kv_heads, head_size = cache.packed
    strides = _check_heads("query", query, (num_tokens, query_heads, head_size), cache)
    _check_heads("out", out, (num_tokens, query_heads, head_size), cache)
    if query_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"query: needs a multiple of the {kv_heads} KV heads, given {query_heads} heads")
    if not out.is_contiguous():
        raise ValueError(f"out: needs to be contiguous, given {shown(out)}")
    if window < 0 or not softcap >= 0.0:
        raise ValueError(f"window, softcap: need 0 (none) or more, given {window}, {softcap}")
    library.run(
        "weft_attend",
        _pack_attend(
            query.data_ptr(), strides[0], strides[1], out.data_ptr(), num_tokens, query_heads,
            query.dtype is torch.bfloat16, window, torch.get_num_threads(), scale, softcap,
            *cache.packed, *packed.numbers,
        ),
        cache,
        packed,
    )  # fmt: skip


class Attend:
    """Paged attention over one KV pool; `keys`, `values`: one tensor per layer, [num_blocks, block_size, H, D]."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._caches = [Cache(keys=k, values=v) for k, v in zip(keys, values, strict=True)]
        self._packed: Packed | None = None

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
        """Store this step's keys and values in `layer`, and return the attention [T, Hq, D]."""
        packed = self._packed
        if packed is None or packed.paging is not paging:  # the first layer of a step packs its paging for all
            packed = self._packed = pack(paging)
        cache = self._caches[layer]
        store(key, value, cache, paging.kv_slots)
        out = torch.empty(query.shape, dtype=query.dtype)
        attend(query, cache, packed, out, scale=scale, window=window, softcap=softcap)
        return out


def _check_metadata(name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> None:
    if given.shape != shape or given.dtype is not dtype or not given.is_cpu or not given.is_contiguous():
        needed = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: needs contiguous {list(shape)} {needed} on the CPU, given {shown(given)}")


def _check_heads(name: str, given: Tensor, shape: tuple[int, int, int], cache: Cache) -> tuple[int, ...]:
    """Return the strides of `given`, after checking it."""
    strides = given.stride()
    if given.shape != shape or given.dtype is not cache.keys.dtype or not given.is_cpu:
        raise ValueError(f"{name}: needs {list(shape)} {cache.keys.dtype} on the CPU, given {shown(given)}")
    if strides[2] != 1:
        raise ValueError(f"{name}: needs a contiguous last dimension, given {shown(given)}")
    if given.requires_grad:
        raise ValueError(f"{name}: carries a gradient, which the kernels do not")
    return strides
