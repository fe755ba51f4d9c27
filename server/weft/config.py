"""Every knob, frozen, with its unit in its name. Names follow vLLM where vLLM has the knob.

Values are checked where they enter: `__post_init__` raises ValueError naming the knob, its rule and the given value.
"""

import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from weft.v1 import endpoint

MIB = 1 << 20
GIB = 1 << 30


class Quantization(StrEnum):
    """How the base's linear weights are held (bitsandbytes)."""

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"


class LogLevel(StrEnum):
    """What the server logs at least; prompts are never logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def typed_path(text: str | Path) -> Path:
    """Return the path that a user typed; one that is plainly meant as a path is made absolute.

    A Path forgets a leading "./" and a trailing "/", and what is left of ./models/typo looks like a hub id.
    """
    path = Path(text).expanduser()
    typed = str(text)
    return path.absolute() if typed.startswith((".", "/", "~")) or typed.endswith("/") else path


def default_store() -> Path:
    """Return the user's own directory for adapters (XDG base directories: $XDG_DATA_HOME, or ~/.local/share)."""
    data = os.environ.get("XDG_DATA_HOME", "")
    root = Path(data) if os.path.isabs(data) else Path("~/.local/share").expanduser()
    return root / "weft" / "adapters_store"


def _require(condition: bool, knob: str, rule: str, given: object) -> None:
    if not condition:
        raise ValueError(f"{knob} {rule}, given {given!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which base model, and how it is held.

    path: a Hugging Face causal-LM directory, a .gguf file, or a hub id (org/name, org/name@revision).
    device: "auto" takes CUDA when there is one.
    dtype: "auto" is bfloat16, or float32 for a float32 checkpoint without quantization, and on a CPU that does not
        multiply bfloat16 (model/packed.py).
    num_threads: CPU threads of a step; 0 leaves torch's default.
    double_quant: [nf4] hold the scales in 8 bits too, as QLoRA did: 7 % less memory, 15 to 20 % slower. On CUDA they
        are held in 32 bits once they are loaded.
    shadow_bytes: [nf4 on CUDA] memory to spend on 16-bit copies of weights, which make steps of more than 64 rows
        faster; 0 has none.
    """

    path: Path
    quantization: Quantization = Quantization.NF4
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int = 0
    double_quant: bool = False
    shadow_bytes: int = 0

    def __post_init__(self) -> None:
        _require(self.device in ("auto", "cpu", "cuda"), "device", "must be auto, cpu or cuda", self.device)
        _require(
            self.dtype in ("auto", "bfloat16", "float16", "float32"),
            "dtype",
            "must be auto, bfloat16, float16 or float32",
            self.dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Size of the batch and of the KV cache.

    max_model_len: prompt, virtual and generated tokens of one request; None takes the model's own limit, or what the
        KV cache holds where that is less.
    memory_bytes: what weights, adapters and KV cache may take together; None takes what the machine has free.
    kv_cache_bytes: size of the paged pool; None takes `num_kv_blocks` if set, else room for `max_num_seqs` requests of
        `max_model_len`, bounded by 1 GiB and half of the free memory on a CPU, 80 % of it on CUDA.
    stream_interval_s: tokens go to streams together, this long after the last ones, because each message costs time
        that steps do not get; first tokens and ends go at once, and so does everything at 0.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    memory_bytes: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    max_queued_requests: int = 256
    stream_interval_s: float = 0.04

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 1, "max_num_seqs", "must be at least 1", self.max_num_seqs)
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"must be at least max_num_seqs ({self.max_num_seqs})",
            self.max_num_batched_tokens,
        )
        _require(self.block_size >= 1, "block_size", "must be at least 1", self.block_size)
        _require(self.max_queued_requests >= 1, "max_queued_requests", "must be at least 1", self.max_queued_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What an adapter may be (reference: default limits of the error contract).

    ignored_config_keys: keys of adapter_config.json that this server does not know and may ignore, whatever they say.
    """

    file_bytes_max: int = 512 * MIB
    header_bytes_max: int = 1 * MIB
    config_bytes_max: int = 256 * 1024
    metadata_bytes_max: int = 16 * 1024
    num_tensors_max: int = 8192
    rank_max: int = 256
    bottleneck_size_max: int = 2048
    scaling_max: float = 64.0
    weight_abs_max: float = 1e3
    num_virtual_tokens_max: int = 256
    num_invocation_tokens_max: int = 256
    num_experts_max: int = 64
    ignored_config_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyConfig:
    """Memory for adapters, in bytes: what fits is decided by bytes, never by a count."""

    device_bytes: int = 1 * GIB
    host_bytes: int = 4 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Bounds of one generate request.

    deadline_default_s: for callers without a deadline; None lets an answer take the time it takes.
    deadline_max_s: for every request, whatever its caller asks for; None leaves it to callers.
    stream_events_max: events a caller may leave unread before its stream is ended.
    """

    prompt_bytes_max: int = 1 * MIB
    max_new_tokens_max: int = 4096
    max_new_tokens_default: int = 256
    stop_count_max: int = 4
    stop_bytes_max: int = 128
    logprobs_max: int = 5
    composition_parts_max: int = 8
    composition_weight_abs_max: float = 4.0
    token_ranges_max: int = 16
    request_id_bytes_max: int = 128
    cache_salt_bytes_max: int = 128
    deadline_default_s: float | None = None
    deadline_max_s: float | None = None
    stream_events_max: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Addresses and lifetimes of the server process.

    port, metrics_port: 0 picks a free one.
    drain_timeout_s: how long running requests may go on after SIGTERM.
    uploads_max, uploads_waiting_max: uploads that are received at a time, and that wait for their turn.
    log_level: what is logged at least; prompts never are.
    """

    host: str = endpoint.HOST
    port: int = endpoint.PORT
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    drain_timeout_s: float = 30.0
    reflection: bool = True
    receive_bytes_max: int = 4 * MIB
    unregister_timeout_default_s: float = 30.0
    unregister_timeout_max_s: float = 600.0
    upload_idle_timeout_s: float = 10.0
    uploads_max: int = 2
    uploads_waiting_max: int = 64
    log_level: LogLevel = LogLevel.INFO

    def __post_init__(self) -> None:
        for knob in ("port", "metrics_port"):
            _require(0 <= getattr(self, knob) <= 65535, knob, "must be 0 to 65535", getattr(self, knob))
        _require(self.uploads_max >= 1, "uploads_max", "must be at least 1", self.uploads_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeftConfig:
    """Everything a server is built from."""

    model: ModelConfig
    store: Path = field(default_factory=default_store)
    allowed_sources: tuple[Path, ...] = ()
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: AdapterLimits = field(default_factory=AdapterLimits)
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    requests: RequestLimits = field(default_factory=RequestLimits)
    server: ServerConfig = field(default_factory=ServerConfig)
