"""The bounds of a decode step: the bytes that it must read, at the copy rate measured on this device.

step ≥ max(bytes / bandwidth, operations / rate) · bytes = weights as they are held + keys and values + adapters
"""

import time
from typing import Any, NamedTuple

import torch

from weft.config import Quantization
from weft.methods.protocol import SiteKind
from weft.model.loader import Base

_NF4_BYTES = 0.5 + 4 / 64  # per weight: four bits, and a float32 scale for each 64


class Device(NamedTuple):
    """Measured rates of a device."""

    name: str
    bytes_per_s: float  # bytes read and written by a copy within its memory
    flops_per_s: float  # of a bfloat16 product


class Work(NamedTuple):
    """Costs of a decode step: bytes of weights, bytes of keys and values per token of context, operations per row."""

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_row: int


def measure(device: torch.device, *, copy_bytes: int, product_size: int) -> Device:
    """Copy and multiply several times; return the best of each."""
    source = torch.ones(copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied_s = _best_s(device, lambda: target.copy_(source))
    left = torch.randn(product_size, product_size, device=device, dtype=torch.bfloat16)
    product_s = _best_s(device, lambda: left @ left)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Device(name, 2 * source.nbytes / copied_s, 2 * product_size**3 / product_s)


def _best_s(device: torch.device, run: Any) -> float:
    best = float("inf")
    for _ in range(8):
        _finish(device)
        begin = time.perf_counter()
        run()
        _finish(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work_of(base: Base) -> Work:
    """Return a step's reads of a base: the weights of linear modules and head, once; the rest is negligible."""
    shape, itemsize = base.shape, base.dtype.itemsize
    linear, head = (
        sum(site.in_features * site.out_features for site in shape.of_kind(kind))
        for kind in (SiteKind.LINEAR, SiteKind.HEAD)
    )
    per_weight = _NF4_BYTES if base.quantization is Quantization.NF4 else itemsize
    kv_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize
    return Work(round(per_weight * linear) + itemsize * head, kv_bytes, 2 * (linear + head))


def bound(device: Device, work: Work, *, rows: int, context: int, adapter_bytes: int) -> float:
    """Return the tokens/s that a step of `rows` cannot exceed. adapter_bytes: of all distinct adapters in the batch."""
    num_bytes = work.weight_bytes + rows * context * work.kv_bytes_per_token + adapter_bytes
    step_s = max(num_bytes / device.bytes_per_s, rows * work.flops_per_row / device.flops_per_s)
    return rows / step_s
