"""Attention over a paged KV cache on the CPU: decode and chunked prefill in one call.

Shapes: T query tokens in the batch, B requests, Hq query heads, Hkv KV heads (Hq is a multiple of it), D head size,
S spans of virtual positions at most, P positions in all spans of a request. A query row's bits depend on its own query,
keys and log-gates alone: not on the other requests, T, B, S, the width of the block table, the block size, the number
of threads, or how its prompt was cut into chunks.
"""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.kernels.cpu import library

_DTYPES = (torch.float32, torch.bfloat16)
_HEAD_SIZE_MAX = 256
_pack_store = struct.Struct("=16q").pack  # StoreCall in attention.cpp
_pack_attend = struct.Struct("=9q2d15q").pack  # Call in attention.cpp


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The paged keys and values of one layer. Made once; `store` writes them.

    keys, values: [num_blocks, block_size, Hkv, D], contiguous, both float32 or both bfloat16; D is a multiple of 8 up
      to 256, and one that is a multiple of 32 saves copies.
    """

    keys: Tensor
    values: Tensor
    packed: tuple[int, ...] = field(init=False, repr=False, compare=False)  # Cache in attention.cpp

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        for name, given in (("keys", keys), ("values", values)):
            if given.dim() != 4 or given.dtype not in _DTYPES or not given.is_cpu or not given.is_contiguous():
                raise ValueError(
                    f"{name}: needs contiguous [num_blocks, block_size, Hkv, D] float32 or bfloat16 on the CPU, "
                    f"given {_shown(given)}"
                )
        if keys.shape != values.shape or keys.dtype is not values.dtype:
            raise ValueError(f"values: needs the shape and dtype of keys, {_shown(keys)}, given {_shown(values)}")
        if keys.numel() == 0 or keys.shape[3] % 8 or keys.shape[3] > _HEAD_SIZE_MAX:
            raise ValueError(
                f"keys: needs D a multiple of 8 up to {_HEAD_SIZE_MAX} and no empty dimension, given {_shown(keys)}"
            )
        object.__setattr__(self, "packed", (keys.data_ptr(), values.data_ptr(), *keys.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whose tokens the query rows of one step are, and where each request's keys lie.

    query_start: [B + 1] int32, from 0 up to T; request b has the rows query_start[b]:query_start[b + 1], and these are
      its last real tokens.
    context_lens: [B] int32, real tokens of the request in the cache once this step's are stored.
    virtual_lens: [B, S] int32, positions in each span of virtual ones, 0 for none; S may be 0. Each span fills the
      next ceil(length / block_size) blocks of the table; the rest of its last is a hole; real token 0 begins the block
      after them all.
    block_tables: [B, any] int32, contiguous; the blocks of each request in order. Columns past its last are never
      read, nor are holes and what lies before every query's sliding window, whatever stands there.
    log_gates: [T, S] float32, contiguous, read anew by each call; what is added to a row's scores of a span, where
      -inf means that the row does not see the span, whatever it holds. None: 0 everywhere.
    """

    query_start: Tensor
    context_lens: Tensor
    virtual_lens: Tensor
    block_tables: Tensor
    log_gates: Tensor | None = None
    packed: tuple[int, ...] = field(init=False, repr=False, compare=False)  # Batch in attention.cpp

    def __post_init__(self) -> None:
        num_requests = self.context_lens.shape[0] if self.context_lens.dim() else 0
        _check_metadata("query_start", self.query_start, (num_requests + 1,))
        _check_metadata("context_lens", self.context_lens, (num_requests,))
        num_spans = self.virtual_lens.shape[-1] if self.virtual_lens.dim() else 0
        _check_metadata("virtual_lens", self.virtual_lens, (num_requests, num_spans))
        width = self.block_tables.shape[-1] if self.block_tables.dim() else 0
        _check_metadata("block_tables", self.block_tables, (num_requests, width))
        tensors = self.query_start, self.context_lens, self.virtual_lens, self.block_tables
        pointers = [tensor.data_ptr() for tensor in tensors]
        num_gate_rows = gates_at = 0
        if self.log_gates is not None and num_spans:
            num_gate_rows = self.log_gates.shape[0] if self.log_gates.dim() else 0
            _check_metadata("log_gates", self.log_gates, (num_gate_rows, num_spans), torch.float32)
            gates_at = self.log_gates.data_ptr()
        object.__setattr__(self, "packed", (*pointers, gates_at, num_requests, width, num_spans, num_gate_rows))


def store(key: Tensor, value: Tensor, cache: Cache, kv_slots: Tensor) -> None:
    """Write the new keys and values into the cache, in place.

    Semantics: cache.keys.view(-1, Hkv, D)[kv_slots[t]] = key[t], and the values likewise; no slot may come twice.

    key, value: [T, Hkv, D] of the cache's dtype, any token and head strides, D contiguous.
    kv_slots: [T] int64, contiguous; block * block_size + offset.
    """
    num_tokens = key.shape[0]
    _, _, _, _, kv_heads, head_size = cache.packed
    key_strides = _check_heads("key", key, (num_tokens, kv_heads, head_size), cache)
    value_strides = _check_heads("value", value, (num_tokens, kv_heads, head_size), cache)
    if kv_slots.dtype is not torch.int64 or kv_slots.shape != (num_tokens,) or not kv_slots.is_contiguous():
        raise ValueError(f"kv_slots: needs contiguous [{num_tokens}] int64, given {_shown(kv_slots)}")
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
    query: Tensor, cache: Cache, batch: Batch, out: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
) -> None:
    """Write the attention of each query row over its request's stored keys to `out`, in place.

    Semantics: with s(q, k) = scale * (q . k), or softcap * tanh(scale * (q . k) / softcap) where softcap is not 0,
      plus log_gates[t, i] where k is in span i,
      out[t, h] = sum over visible k of softmax(s(query[t, h], .))[k] * value[k], in float32, rounded once;
      query head h reads KV head h // (Hq / Hkv). The query at real index n sees every virtual position and the real
      tokens 0 .. n; with a window, of those only the ones less than `window` positions back, where virtual position j
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
        raise ValueError(f"out: needs to be contiguous, given {_shown(out)}")
    if window < 0 or not softcap >= 0.0:
        raise ValueError(f"window, softcap: need 0 (none) or more, given {window}, {softcap}")
    library.run(
        "weft_attend",
        _pack_attend(
            query.data_ptr(), strides[0], strides[1], out.data_ptr(), num_tokens, query_heads,
            query.dtype is torch.bfloat16, window, torch.get_num_threads(), scale, softcap,
            *cache.packed, *batch.packed,
        ),
        cache,
        batch,
    )  # fmt: skip


def _check_metadata(name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> None:
    if given.shape != shape or given.dtype is not dtype or not given.is_cpu or not given.is_contiguous():
        needed = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: needs contiguous {list(shape)} {needed} on the CPU, given {_shown(given)}")


def _check_heads(name: str, given: Tensor, shape: tuple[int, int, int], cache: Cache) -> tuple[int, ...]:
    """The strides of `given`."""
    strides = given.stride()
    if given.shape != shape or given.dtype is not cache.keys.dtype or not given.is_cpu:
        raise ValueError(f"{name}: needs {list(shape)} {cache.keys.dtype} on the CPU, given {_shown(given)}")
    if strides[2] != 1:
        raise ValueError(f"{name}: needs a contiguous last dimension, given {_shown(given)}")
    if given.requires_grad:
        raise ValueError(f"{name}: carries a gradient, which the kernels do not")
    return strides


def _shown(given: Tensor) -> str:
    return f"{given.dtype} {list(given.shape)} with strides {given.stride()} on {given.device}"
