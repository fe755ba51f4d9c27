"""Memory plan of a server: weights, adapters, the paged KV cache, and the longest request that then fits.

A pure function of numbers, called once the weights are in memory. The model's own limit is often far more than a
machine can cache (131,072 tokens of Llama 3.1 8B are 16 GiB). If max_model_len is not set, it is then cut to what fits,
and the plan says so. If it is set and does not fit, the server refuses to start.
"""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.config import GIB, EngineConfig

_CPU_KV_BYTES_MAX = 1 * GIB  # a new pool is filled with zeros, which takes a second for each GiB
_CPU_FREE_SHARE = 0.5
_CUDA_FREE_SHARE = 0.8
_TOKENS_MIN = 256  # a server that cannot cache this many tokens for one request is useless
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes for each purpose; `left` is for activations, adapters on the host, and other processes.

    fitted: why `max_model_len` is below the model's own limit, or "".
    """

    adapters: int
    kv: int
    left: int
    num_kv_blocks: int
    max_model_len: int
    fitted: str


def make(
    engine: EngineConfig, *, device: str, free: int, adapters: int, token_bytes: int, model_len: int
) -> MemoryPlan:
    """Plan a server whose weights are loaded.

    device: "cpu" or "cuda". free: bytes left beside the weights. adapters: bytes allowed for adapters
    (residency.device_bytes). token_bytes: of one token's keys and values. model_len: the model's own limit in tokens.
    Raises ValueError with knob, limit and remedy if a configured size does not fit.
    """
    asked = engine.max_model_len
    if asked is not None and asked > model_len:
        raise ValueError(f"max_model_len must be at most {model_len}, the model's own limit, given {asked}")
    wanted = model_len if asked is None else asked
    block_bytes = token_bytes * engine.block_size
    # On a CPU, adapters take memory only when they are loaded: at most a quarter of it is reserved for them.
    adapters = adapters if device == "cuda" else min(adapters, free // 4)
    room_blocks, named = _room(engine, device, free, adapters, block_bytes)
    per_request = -(-wanted // engine.block_size)
    max_model_len, fitted = wanted, ""
    if room_blocks < per_request:
        if asked is not None or room_blocks * engine.block_size < min(_TOKENS_MIN, wanted):
            raise ValueError(
                f"kv cache: {room_blocks} blocks of {engine.block_size} tokens ({named}) cannot hold one request of "
                f"max_model_len {wanted}; raise kv_cache_bytes to {per_request * block_bytes} or lower max_model_len"
            )
        max_model_len = room_blocks * engine.block_size
        fitted = (
            f"from the model's {model_len} to {max_model_len} tokens, what {named} holds; "
            f"--kv-cache-bytes {per_request * block_bytes} would hold all"
        )
    num_blocks = room_blocks
    if engine.num_kv_blocks is None and engine.kv_cache_bytes is None:
        num_blocks = min(room_blocks, -(-max_model_len // engine.block_size) * engine.max_num_seqs)
    kv = num_blocks * block_bytes
    return MemoryPlan(
        adapters=adapters,
        kv=kv,
        left=free - adapters - kv,
        num_kv_blocks=num_blocks,
        max_model_len=max_model_len,
        fitted=fitted,
    )


def _room(engine: EngineConfig, device: str, free: int, adapters: int, block_bytes: int) -> tuple[int, str]:
    """Return the largest number of blocks, and what bounds it, in words."""
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks, "num_kv_blocks"
    if engine.kv_cache_bytes is not None:
        return engine.kv_cache_bytes // block_bytes, f"kv_cache_bytes of {_gib(engine.kv_cache_bytes)}"
    share = int((_CUDA_FREE_SHARE if device == "cuda" else _CPU_FREE_SHARE) * max(0, free - adapters))
    if device == "cpu" and share > _CPU_KV_BYTES_MAX:
        return _CPU_KV_BYTES_MAX // block_bytes, f"a KV cache of {_gib(_CPU_KV_BYTES_MAX)}, the default on a CPU,"
    return share // block_bytes, f"a KV cache of {_gib(share)}, the share of {_gib(free)} of free memory,"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def free_bytes(device: torch.device, memory_bytes: int | None = None) -> int:
    """Measure the free memory of a device; `memory_bytes` bounds the total that this process may take there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of tensors that loading freed
        free, _ = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
    else:
        free, taken = _free_on_the_host(), _taken_on_the_host()
    return free if memory_bytes is None else max(0, min(free, memory_bytes - taken))


def _free_on_the_host() -> int:
    """Return the least that the machine, the control group and the process's own limits leave."""
    found = [_available(Path("/proc/meminfo")), _left_in_group(Path("/sys/fs/cgroup"))]
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - _taken_on_the_host())
    return max(0, min(found))


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return _UNLIMITED


def _left_in_group(group: Path) -> int:
    """Return the bytes that a container may still take, by cgroup v2, else v1."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = (group / limit_name).read_text().strip(), (group / usage_name).read_text().strip()
        except OSError:
            continue
        return _UNLIMITED if limit == "max" else int(limit) - int(usage)
    return _UNLIMITED


def _taken_on_the_host() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
